import sysconfig
from pathlib import Path

import pytest

from pipeline.corpus.sources.python_docs import (
    PythonDocsSource,
    build_examples,
    module_documents,
    topic_documents,
)
from pipeline.corpus.text.duplicates import containment, paragraphs, runs
from pipeline.corpus.text.splits import MAX_CONTAINMENT, deal_splits
from pipeline.errors import ConfigError

MODULE = '''"""Top of the module.

>>> 1 + 1
2

Second paragraph."""

if True:
    class Thing:
        """A thing of
            some kind."""

        def act(self):
            """Act."""

            def inner():
                """Inside."""
'''


@pytest.fixture
def library(tmp_path):
    """A standard library of one module beside things that are not of it."""
    for name in ("pack/__init__.py", "pack/test/test_it.py", "site-packages/x.py", "build-1/y.py"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(MODULE)
    (tmp_path / "broken.py").write_text("def (")
    (tmp_path / "bare.py").write_text("x = 1")
    return tmp_path


def test_docstrings_come_in_source_order_below_their_names(library):
    assert list(module_documents(library)) == [
        (
            "pack",
            [
                "Top of the module.\n\nSecond paragraph.",
                "pack.Thing\nA thing of\nsome kind.",
                "pack.Thing.act\nAct.",
                "pack.Thing.act.inner\nInside.",
            ],
        )
    ]


def test_copied_paragraphs_are_kept_once():
    words = "a paragraph of at least eight words that somebody copied here"
    changed = (
        words.replace("somebody", "nobody") + " and then went on for many more words of its own"
    )
    documents = [
        ("a", [f"{words}\n\nown"]),
        ("b.c", [words.upper(), "Short.", "Short."]),
        ("d", [changed]),
    ]
    examples, dropped = build_examples(documents)
    assert [(one.source, one.text, one.group) for one in examples] == [
        ("a", f"{words}\n\nown", "a"),
        ("b.c", "Short.\n\nShort.", "b"),
        ("d", changed, "d"),
    ]
    assert dropped == {"duplicate_paragraphs": 1}


def test_an_interpreter_without_sources_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr("pipeline.corpus.sources.python_docs.topic_documents", list)
    with pytest.raises(ConfigError, match="give 0 bytes of docstrings, expected at least"):
        PythonDocsSource().read(tmp_path)


def test_topics_are_documents_of_their_own():
    names = [name for name, _ in topic_documents()]
    assert "help:compound" in names
    assert names == sorted(names)


@pytest.mark.slow
def test_no_held_out_text_of_this_interpreter_is_in_its_training_text():
    reading = PythonDocsSource().read(Path())
    assert 1_500_000 < sum(one.text_bytes for one in reading.examples) < 4_000_000
    dealt = deal_splits(
        reading.examples,
        task="causal-lm",
        seed=0,
        validation_share=0.05,
        test_share=0.05,
        unit=reading.unit,
    )
    sizes = {split: sum(one.text_bytes for one in part) for split, part in dealt.splits.items()}
    for split in ("validation", "test"):
        assert 0.04 < sizes[split] / sum(sizes.values()) < 0.06
        assert len(dealt.splits[split]) > 10
    known = set().union(*(runs(one.text) for one in dealt.splits["train"]))
    for split in ("test", "validation"):
        for one in dealt.splits[split]:
            for paragraph in paragraphs(one.text):
                assert containment(paragraph, known) <= MAX_CONTAINMENT
        known |= set().union(*(runs(one.text) for one in dealt.splits[split]))
