"""What the first rows of a corpus show before anything is prepared."""

import json

import pytest

from pipeline.corpus.sources.hub import HubSource
from pipeline.corpus.sources.parallel import ParallelSource
from pipeline.corpus.sources.table import TableSource
from pipeline.corpus.sources.text import HEAD_CHARACTERS, TextSource
from pipeline.corpus.text.preview import preview
from pipeline.errors import ConfigError


def look(source, root, task="classification", classes=None, **options):
    return preview(source, task, root=root, classes=classes, **options)


def test_only_the_first_rows_of_each_file_are_read(tmp_path, write_table):
    write_table("a.tsv", [["text", "y"], *([f"t {n}", "pos"] for n in range(50))])
    rows = [["text", "y"], ["first", "neg"], ["no label", ""]]
    write_table("b.tsv", rows)
    source = TableSource(files={"train": "a.tsv", "validation": "b.tsv"}, label="y")
    found = look(source, tmp_path, rows=1)
    assert [(one.text, one.split) for one in found] == [("t 0", "train"), ("first", "validation")]


@pytest.mark.parametrize(
    ("source", "match"),
    [
        (TableSource(files="gone.tsv", label="y"), "gone.tsv: cannot be read"),
        (
            TableSource(files="a.tsv", label="z"),
            r"a\.tsv: line 2: no column 'z', it has 'text', 'y'",
        ),
        (TableSource(files="head.tsv", label="y"), "corpus.source.files: the files hold no text"),
        (
            TableSource(files={"train": "a.tsv", "test": "head.tsv"}, label="y"),
            "corpus.source.files.test: the files hold no text",
        ),
        (TextSource(files="empty.txt"), "the files hold no text"),
        (
            ParallelSource(text="a.tsv", target="gone.txt"),
            "gone.txt: cannot be read",
        ),
        (
            ParallelSource(text="a.tsv", target="*.gone"),
            r"corpus\.source\.target: '\*\.gone' matches no file",
        ),
        (HubSource(id="set", label="z"), "set train:1: no column 'z'"),
    ],
)
def test_what_prepare_would_refuse_is_refused(source, match, tmp_path, write_table):
    write_table("a.tsv", [["text", "y"], ["one", "pos"]])
    write_table("head.tsv", [["text", "y"]])
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(json.dumps({"text": "a", "y": "b"}) + "\n")
    with pytest.raises(ConfigError, match=match):
        look(source, tmp_path)


@pytest.mark.parametrize(
    ("task", "label", "classes", "match"),
    [
        ("regression", "many", None, "label 'many' in a train row, expected a finite number"),
        ("classification", "", None, "no label in a train row"),
        ("classification", "neutral", ["pos", "neg"], "label 'neutral' in a train row, expected"),
    ],
)
def test_a_label_that_does_not_suit_is_refused(task, label, classes, match, tmp_path, write_table):
    write_table("a.tsv", [["text", "y"], ["one", label]])
    with pytest.raises(ConfigError, match=match):
        look(TableSource(files="a.tsv", label="y"), tmp_path, task, classes)


def test_what_is_not_at_hand_shows_nothing(tmp_path):
    assert look(HubSource(id="someone/data", label="y"), tmp_path) == []


def test_a_file_that_begins_with_nothing_is_read_on(tmp_path, write_table):
    write_table("a.tsv", [["text", "y"], *([["", "pos"]] * 50), ["good", "pos"]])
    found = look(TableSource(files="a.tsv", label="y"), tmp_path, rows=3)
    assert [one.text for one in found] == ["good"]
    (tmp_path / "a.txt").write_text("\n" * (3 * HEAD_CHARACTERS) + "good")
    (text,) = look(TextSource(files="a.txt"), tmp_path, "causal-lm")
    assert text.text.strip() == "good"
