"""Parallel files: joined by line number, and refused where the numbers do not agree."""

import gzip

import pytest
from pydantic import ValidationError

from pipeline.corpus.sources.parallel import ParallelSource
from pipeline.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def run(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.txt").write_bytes(text.encode())

    return run


def test_line_n_belongs_to_line_n_whatever_ends_it(tmp_path, write):
    write(a="one\r\ntwo\u2028too\n\nfour\n", b="eins\nzwei\ndrei\nvier")
    reading = ParallelSource(text="a.txt", target="b.txt").read(tmp_path)
    assert [(one.text, one.target, one.source) for one in reading.examples] == [
        ("one", "eins", "a.txt:1"),
        ("two\u2028too", "zwei", "a.txt:2"),
        ("four", "vier", "a.txt:4"),
    ]
    assert reading.examples[0].references == ("eins",)
    assert reading.dropped == {"empty": 1}


def test_both_ways_of_naming_files_give_the_same(tmp_path, write):
    write(a="one", b="eins", c="two", d="zwei")
    by_split = ParallelSource.model_validate(
        {
            "files": {
                "train": {"text": "a.txt", "target": "b.txt"},
                "test": {"text": ["c.txt"], "target": "d.txt"},
            }
        }
    )
    by_side = ParallelSource(
        text={"train": "a.txt", "test": "c.txt"}, target={"train": "b.txt", "test": "d.txt"}
    )
    first, second = by_split.read(tmp_path), by_side.read(tmp_path)
    assert first == second
    assert [one.split for one in first.examples] == ["train", "test"]


def test_counts_that_differ_are_refused_with_both(tmp_path, write):
    write(a="one\ntwo", b="eins")
    with pytest.raises(ConfigError, match=r"a\.txt has 2 lines, .*b\.txt 1, expected as many"):
        ParallelSource(text="a.txt", target="b.txt").read(tmp_path)
    with pytest.raises(ConfigError, match=r"2 files of texts \(a\.txt, b\.txt\), 1 of targets"):
        ParallelSource(text=("a.txt", "b.txt"), target="b.txt").read(tmp_path)


@pytest.mark.parametrize(
    "keys", [{}, {"text": "a"}, {"text": "a", "target": "b", "files": {}}, {"target": "b"}]
)
def test_files_are_named_in_one_way(keys):
    with pytest.raises(ValidationError, match="give either files, or text and target"):
        ParallelSource(**keys)


def test_a_side_without_text_is_refused(tmp_path, write):
    write(a="\n", b="\n")
    with pytest.raises(ConfigError, match="the files hold no text"):
        ParallelSource(text="a.txt", target="b.txt").read(tmp_path)


def test_a_published_translation_corpus_reads_to_the_last_row(real_corpora):
    folder = real_corpora / "multi30k"
    source = ParallelSource(
        files={"validation": {"text": "val.en.gz", "target": "val.de.gz"}}  # pyright: ignore
    )
    found = source.read(folder).examples
    with gzip.open(folder / "val.de.gz", "rt", encoding="utf-8") as file:
        last = file.read().strip().split("\n")[-1]
    assert len(found) == 1014
    assert found[-1].target == last


def test_carriage_returns_end_lines_where_nothing_else_does(tmp_path):
    (tmp_path / "a").write_bytes(b"one\rtwo\r")
    (tmp_path / "b").write_bytes(b"eins\nzwei\n")
    reading = ParallelSource(text="a", target="b").read(tmp_path)
    assert [(one.text, one.target) for one in reading.examples] == [
        *(("one", "eins"), ("two", "zwei")),
    ]
