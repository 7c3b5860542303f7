"""prepare: a corpus that cannot be is refused with its file, and what was there stays."""

from pathlib import Path

import pytest

from pipeline.provenance import read_json
from tests.cases import error_line, tiny_params, write_params

TEXT = Path("data/corpus/text")


def table(rows: str, **options: object) -> dict:
    Path("corpus.tsv").write_text("text\tclass\n" + rows)
    source = {"kind": "table", "files": "corpus.tsv", "label": "class", **options}
    return {"source": source, "task": "classification", "classes": ["no", "yes"]}


def rows(*labels: str) -> str:
    return "".join(f"some words number {n}\t{label}\n" for n, label in enumerate(labels))


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        (lambda: Path("corpus.txt").write_text(""), "corpus.source.files: the files hold no text"),
        (
            lambda: Path("corpus.txt").unlink(),
            "corpus.txt: cannot be read (No such file",
        ),
        (lambda: Path("corpus.txt").write_bytes(b"\xff" * 100), "corpus.txt: byte 0"),
        (
            lambda: table(rows(*["no", "yes"] * 30, "maybe")),
            "label 'maybe' in a train row, expected one of 'no', 'yes'",
        ),
        (lambda: table(rows("no"), label="klass"), "klass"),
    ],
)
def test_a_corpus_that_cannot_be_is_refused_and_the_old_one_stays(decant, project, corpus, message):
    before = {path: path.read_bytes() for path in TEXT.rglob("*") if path.is_file()}
    params = tiny_params()
    made = corpus()
    if isinstance(made, dict):
        params["corpus"] = made
    write_params(project, params)
    result = decant("prepare")
    assert result.exit_code == 2, result.output
    assert message in error_line(result)
    assert {path: path.read_bytes() for path in TEXT.rglob("*") if path.is_file()} == before


def test_the_same_corpus_gives_the_same_bytes(decant, project):
    before = {path: path.read_bytes() for path in TEXT.rglob("*") if path.is_file()}
    assert decant("prepare").exit_code == 0
    assert {path: path.read_bytes() for path in TEXT.rglob("*") if path.is_file()} == before


def test_another_task_and_its_columns_are_prepared(decant, empty):
    lines = [f'{{"text": "some words {n}", "to": ["answer {n}", "or {n}"]}}' for n in range(60)]
    Path("corpus.jsonl").write_text("\n".join(lines))
    params = tiny_params()
    source = {"kind": "table", "files": "corpus.jsonl", "target": "to"}
    params["corpus"] = {"source": source, "task": "prompt-target"}
    write_params(empty, params)
    assert decant("prepare").exit_code == 0
    meta = read_json(TEXT / "corpus.json")
    assert (meta["task"], sum(meta["rows"].values())) == ("prompt-target", 60)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ({"task": "translation"}, "corpus.task: found 'translation', expected"),
        ({"task": "messages"}, "corpus.task: messages needs messages and the source text"),
        (
            {"task": "causal-lm", "source": {"kind": "parallel", "text": "corpus.txt"}},
            "corpus.source: expected files of both sides: give either files, or text and target",
        ),
        (
            {"task": "causal-lm", "source": {"kind": "hub", "id": "nobody/nothing", "limt": 1}},
            "corpus.source.limt: unknown key; did you mean 'limit'?",
        ),
    ],
)
def test_a_source_that_does_not_suit_is_named_by_its_key(decant, empty, corpus, message):
    params = tiny_params()
    params["corpus"].update(corpus)
    write_params(empty, params)
    result = decant("prepare")
    assert result.exit_code == 2, result.output
    assert message in error_line(result)
    assert not TEXT.exists()
