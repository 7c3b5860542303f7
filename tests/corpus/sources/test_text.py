import gzip

import pytest
from pydantic import ValidationError

from pipeline.corpus.sources.text import TextSource
from pipeline.errors import ConfigError


def texts(tmp_path, **options):
    return [one.text for one in TextSource(files="*.txt*", **options).read(tmp_path).examples]


def test_one_example_is_a_file_a_paragraph_or_a_line(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"  \n"))
    assert texts(tmp_path) == ["one\ntwo\n\nthree"]
    assert texts(tmp_path, examples="paragraph") == ["one\ntwo", "three"]
    assert texts(tmp_path, examples="line") == ["one", "two", "three"]
    assert TextSource(files="*.txt*").read(tmp_path).dropped == {"empty": 1}


def test_a_separator_is_left_out(tmp_path):
    (tmp_path / "a.txt").write_text("first\n\nstill first\n<|endoftext|>\nsecond<|endoftext|>")
    assert texts(tmp_path, separator="<|endoftext|>") == ["first\n\nstill first", "second"]


def test_short_paragraphs_are_joined_in_order_and_none_is_lost(tmp_path):
    (tmp_path / "a.txt").write_text("aaaa\n\nbbbb\n\ncccc\n\ndd")
    assert texts(tmp_path, examples="paragraph", join_characters=8) == [
        "aaaa\n\nbbbb",
        "cccc\n\ndd",
    ]


def test_files_of_a_split_keep_it_and_provenance_is_of_content(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").write_text("b")
    source = TextSource(files={"train": "a.txt", "test": ("b.txt",)})
    reading = source.read(tmp_path)
    assert [(one.split, one.source, one.source_row) for one in reading.examples] == [
        ("train", "a.txt:1", 0),
        ("test", "b.txt:1", 1),
    ]
    before = reading.provenance
    assert source.read(tmp_path).provenance == before
    (tmp_path / "b.txt").write_text("c")
    assert source.read(tmp_path).provenance != before


def test_empty_and_binary_files_and_contradictions_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "full.txt").write_text("full")
    (tmp_path / "zero.bin").write_bytes(b"a\0b")
    with pytest.raises(ConfigError, match=r"files\.test: the files hold no text"):
        TextSource(files={"train": "full.txt", "test": "empty.txt"}).read(tmp_path)
    with pytest.raises(ConfigError, match=r"zero\.bin: line 1 holds a zero byte"):
        TextSource(files="zero.bin").read(tmp_path)
    with pytest.raises(ValidationError, match="separator and examples: line both"):
        TextSource(files="a", separator="|", examples="line")
    with pytest.raises(ValidationError, match="Extra inputs"):
        TextSource.model_validate({"kind": "text", "files": "a", "seperator": "|"})
