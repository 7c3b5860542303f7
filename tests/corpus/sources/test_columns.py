"""Columns by name: targets, references, classes and chats, from cells and from lists."""

import json

import pytest

from pipeline.corpus.sources.table import TableSource
from pipeline.errors import ConfigError

CHAT = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]


@pytest.fixture
def read(tmp_path):
    """Read JSON rows with the columns that are named."""

    def run(rows, files="t.jsonl", **columns):
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return TableSource(files=files, **columns).read(tmp_path)

    return run


def test_of_several_targets_the_first_is_trained_on_and_all_are_references(read):
    rows = [{"text": "a", "x": "1", "y": "2"}, {"text": "b", "x": "", "y": "2"}]
    found = read(rows, target=("x", "y")).examples
    assert [(one.target, one.references) for one in found] == [("1", ("1", "2")), ("2", ("2",))]
    assert read(rows, target="y").examples[0].references == ("2",)


def test_alternatives_in_a_cell_and_items_of_a_list_are_references(read):
    rows = [{"text": "a", "x": "1 | 2 | 1"}, {"text": "b", "x": ["3", "4 | 5"]}]
    found = read(rows, target="x", alternatives=" | ").examples
    assert [one.references for one in found] == [("1", "2"), ("3", "4", "5")]
    # No blank around a separator is a part of what is learnt.
    assert read(rows, target="x", alternatives="|").examples[0].references == ("1", "2")


def test_splits_may_have_targets_of_their_own(tmp_path, write_table):
    write_table("train.tsv", [["text", "one"], ["a", "A"]])
    write_table("test.tsv", [["text", "two", "three"], ["b", "B", "BB"]])
    source = TableSource(
        files={"train": "train.tsv", "test": "test.tsv"},
        target={"train": "one", "test": ("two", "three")},
    )
    found = source.read(tmp_path).examples
    assert [one.references for one in found] == [("A",), ("B", "BB")]


def test_classes_come_from_a_cell_or_a_list_and_an_empty_cell_is_no_class(read):
    rows = [{"text": "a", "y": "x; z;x"}, {"text": "b", "y": ["z"]}, {"text": "c", "y": ""}]
    found = read(rows, labels="y", separator=";").examples
    assert [one.labels for one in found] == [("x", "z"), ("z",), ()]
    missing = read([{"text": "a"}], files={"test": "t.jsonl"}, labels="y").examples
    assert missing[0].labels is None


def test_chats_come_as_lists_or_as_their_json(read):
    more = [{**turn, "weight": 1} for turn in CHAT]
    rows = [{"m": more}, {"m": json.dumps(CHAT)}, {"m": []}]
    reading = read(rows, messages="m")
    assert [one.messages for one in reading.examples] == [tuple(CHAT)] * 2
    assert [one.references for one in reading.examples] == [("b",)] * 2
    assert reading.dropped == {"empty": 1}


def test_more_than_content_is_kept_and_nulls_of_tables_are_not(read):
    call = {"function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    turn = {"role": "assistant", "content": None, "tool_calls": [call], "name": None, "id": 4}
    (example,) = read([{"m": [CHAT[0], turn]}], messages="m").examples
    assert example.messages is not None
    more = '{"tool_calls": [{"function": {"name": "f", "arguments": {"a": 1}}}]}'
    assert example.messages == (CHAT[0], {"role": "assistant", "content": None, "more": more})


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("[{", r"line 1: column 'm' is not JSON"),
        ("{}x", r"line 1: column 'm' is not JSON"),
        ([{"role": "user"}], r"line 1: column 'm' holds .*, expected a list of \{role, content\}"),
        ([{"role": "user", "content": None}], "both texts"),
        ({"role": "user", "content": "a"}, "line 1: column 'm' holds"),
        (["a"], "line 1: column 'm' holds"),
        (7, "line 1: column 'm' holds"),
    ],
)
def test_what_is_no_chat_is_refused_with_its_line(read, cell, message):
    with pytest.raises(ConfigError, match=message):
        read([{"m": cell}], messages="m")


def test_half_a_character_is_refused_with_its_line(read):
    chat = [{"role": "user", "content": "\ud83d"}]
    for row, columns in (({"text": "a \ud83d"}, {}), ({"m": chat}, {"messages": "m"})):
        with pytest.raises(ConfigError, match=r"line 1: column '\w+' holds half a character"):
            read([row], **columns)


def test_provenance_names_the_columns_a_task_uses(read):
    plain = read([{"text": "a"}]).provenance
    assert set(plain) == {"kind", "files", "text", "pair", "label", "quoting"}
    with_target = read([{"text": "a", "x": "b"}], target="x").provenance
    assert with_target["target"] == "x"
    assert "messages" not in with_target


def test_nan_is_missing_as_null_is(read):
    rows = [
        {"text": "one", "y": "a"},
        {"text": float("nan"), "y": "b"},
        {"text": None, "y": "b"},
        {"text": "two", "y": float("nan")},
        {"text": "three", "y": None},
    ]
    reading = read(rows, label="y")
    assert [(one.text, one.label) for one in reading.examples] == [
        *(("one", "a"), ("two", ""), ("three", "")),
    ]
    assert reading.dropped == {"empty": 2}
    several = read([{"text": "a", "all": float("nan")}, {"text": "b", "all": []}], labels="all")
    assert [one.labels for one in several.examples] == [None, ()]
    targets = read([{"text": "a", "t": float("nan")}], target="t")
    assert [(one.target, one.references) for one in targets.examples] == [("", ())]


@pytest.mark.parametrize("value", [float("inf"), float("-inf")])
def test_infinity_is_no_label(read, value):
    with pytest.raises(ConfigError, match=r"t\.jsonl: line 1: column 'y' holds -?inf, expected"):
        read([{"text": "one", "y": value}], label="y")


def test_a_space_too_many_is_no_other_class(read):
    reading = read([{"text": "one", "y": "pos"}, {"text": "two", "y": " pos "}], label="y")
    assert [one.label for one in reading.examples] == ["pos", "pos"]


@pytest.mark.parametrize("column", ["text", "label"])
def test_a_zero_byte_is_no_text(read, column):
    row = {"text": "one", "label": "a"} | {column: "a\0b"}
    with pytest.raises(ConfigError, match=f"line 1: column {column!r} holds a zero byte"):
        read([row], label="label")
