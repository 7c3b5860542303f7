import gzip
import logging

import pyarrow as pa
import pytest
from pyarrow import ipc, parquet

from pipeline.corpus.sources.table import TableSource
from pipeline.errors import ConfigError


def test_columns_are_found_by_name_and_rows_by_line(tmp_path, write_table):
    write_table("t.tsv.gz", [["label", "text", "b"], ["1", "some", "more"], ["0", "next", ""]])
    found = TableSource(files="t.tsv.gz", pair="b", label="label").read(tmp_path).examples
    assert [(e.text, e.pair, e.label, e.source, e.source_row) for e in found] == [
        ("some", "more", "1", "t.tsv.gz:2", 0),
        ("next", "", "0", "t.tsv.gz:3", 1),
    ]


def test_quotes_enclose_cells_or_are_text(tmp_path, write_table):
    write_table("t.csv", [["text"], ['a, "b"\nc'], ["x" * 200_000]])
    quoted = TableSource(files="t.csv").read(tmp_path).examples
    assert [one.text for one in quoted] == ['a, "b"\nc', "x" * 200_000]
    (tmp_path / "raw.tsv").write_text('text\n"open\nit\'s "so"\n')
    raw = TableSource(files="raw.tsv", quoting=False).read(tmp_path).examples
    assert [one.text for one in raw] == ['"open', 'it\'s "so"']
    with pytest.raises(ConfigError, match=r"raw\.tsv: line .* set quoting: false"):
        TableSource(files="raw.tsv").read(tmp_path)


def test_json_lines_keep_numbers_and_booleans_as_text(tmp_path):
    (tmp_path / "t.jsonl").write_text('{"text": "a", "y": 1}\n\n{"text": "b\\nc", "y": true}\n')
    found = TableSource(files="t.jsonl", label="y").read(tmp_path).examples
    assert [(one.text, one.label) for one in found] == [("a", "1"), ("b\nc", "true")]


def test_a_test_file_may_lack_the_label_column_and_only_that(tmp_path, write_table):
    write_table("train.tsv", [["text", "y"], ["a", "1"]])
    write_table("test.tsv", [["text"], ["b"]])
    files = {"train": "train.tsv", "test": "test.tsv"}
    assert TableSource(files=files, label="y").read(tmp_path).examples[1].label == ""
    with pytest.raises(ConfigError, match=r"no column 'y', it has 'text'"):
        TableSource(files={"train": "test.tsv"}, label="y").read(tmp_path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.tsv", "text\ty\na\n", r"a\.tsv: line 2: 1 cells, expected 2 \(text, y\)"),
        ("a.tsv", "", r"a\.tsv: is empty, expected a header"),
        ("a.tsv", "text\ttext\na\tb\n", r"a\.tsv: 2 columns are named 'text', expected one"),
        ("a.tsv", "text\n", r"corpus\.source\.files: the files hold no text"),
        ("a.tsv", "sentence\nb\n", r"line 2: no column 'text', it has 'sentence'"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl: line 2: not JSON"),
        ("a.jsonl", "[1]\n", r"a\.jsonl: line 1: a list, expected one JSON object"),
        ("a.jsonl", '{"text": ["a"]}\n', r"line 1: column 'text' holds a list"),
        ("a.dat", "text\na\n", r"a\.dat: cannot tell the format .* set corpus\.source\.format"),
    ],
)
def test_bad_files_are_named_with_line_and_what_to_do(tmp_path, name, data, message):
    (tmp_path / name).write_text(data)
    with pytest.raises(ConfigError, match=message):
        TableSource(files=name).read(tmp_path)


def test_a_broken_gzip_is_the_files_error_even_in_mid_read(tmp_path):
    whole = gzip.compress(b"text\n" + b"".join(b"%d\n" % i for i in range(50_000)))
    (tmp_path / "a.tsv.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="not a whole gzip file"):
        TableSource(files="a.tsv.gz").read(tmp_path)


def test_published_tables_read_to_the_last_row(real_corpora):
    expected = {"sst2-sentence/test": 1821, "cola/train": 8551}
    for name, rows in expected.items():
        source = TableSource(files=f"{name}.tsv.gz", text="sentence", label="label", quoting=False)
        found = source.read(real_corpora).examples
        assert len(found) == rows
        assert {one.label for one in found} == {"0", "1"}
    pairs = TableSource(
        files="mrpc/test.tsv.gz", text="sentence1", pair="sentence2", label="label", quoting=False
    )
    assert sum(bool(one.pair) for one in pairs.read(real_corpora).examples) == 1725
    stories = TableSource(files="tinystories/valid.jsonl.gz").read(real_corpora).examples
    assert len(stories) == 200


def arrow_table():
    return pa.table({"text": ["a", "", "c"], "y": [1, 2, 3], "image": [b"x", b"y", b"z"]})


def write_file(path, table):
    with ipc.new_file(str(path), table.schema) as writer:
        writer.write_table(table)


def write_stream(path, table):
    with ipc.new_stream(str(path), table.schema) as writer:
        writer.write_table(table)


def write_parquet(path, table):
    parquet.write_table(table, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [("t.parquet", write_parquet), ("t.feather", write_file), ("t.arrow", write_stream)],
)
def test_parquet_and_arrow_read_as_text_tables_do(tmp_path, name, write):
    write(tmp_path / name, arrow_table())
    reading = TableSource(files=name, label="y").read(tmp_path)
    assert [(one.text, one.label, one.source) for one in reading.examples] == [
        ("a", "1", f"{name}:1"),
        ("c", "3", f"{name}:3"),
    ]
    assert reading.dropped == {"empty": 1}
    with pytest.raises(
        ConfigError, match=rf"{name}: line 1: no column 'z', it has 'text', 'y', 'image'"
    ):
        TableSource(files=name, label="z").read(tmp_path)
    (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:60])
    with pytest.raises(ConfigError, match=rf"{name}: not a readable \w+ file"):
        TableSource(files=name).read(tmp_path)


def test_lists_of_a_column_file_are_classes_and_targets(tmp_path):
    table = pa.table({"text": ["a"], "y": [["p", "q"]], "to": [["b", "c"]]})
    write_parquet(tmp_path / "t.parquet", table)
    found = TableSource(files="t.parquet", labels="y", target="to").read(tmp_path).examples[0]
    assert (found.labels, found.references) == (("p", "q"), ("b", "c"))


def test_several_parquet_files_are_several_splits(tmp_path):
    for name in ("a", "b", "c"):
        write_parquet(
            tmp_path / f"{name}.parquet", pa.table({"text": [f"{name} {i}" for i in "12"]})
        )
    files = {"train": ("a.parquet", "b.parquet"), "test": "c.parquet"}
    found = TableSource(files=files).read(tmp_path).examples
    assert [(one.split, one.text) for one in found] == [
        *(("train", f"{name} {i}") for name in "ab" for i in "12"),
        *(("test", f"c {i}") for i in "12"),
    ]
    assert [one.source_row for one in found] == list(range(6))


@pytest.mark.parametrize("between", [["c\tpos"], ["c\tpos", ""]], ids=["rows", "blank line"])
def test_rows_between_two_quote_marks_do_not_vanish(tmp_path, between):
    lines = ["text\tlabel", "a\tpos", '"b\tneg', *between, 'd"\tneg', "e\tpos"]
    (tmp_path / "t.tsv").write_text("\n".join(lines) + "\n")
    with pytest.raises(
        ConfigError, match=rf"t\.tsv: lines 3 to {4 + len(between)}: .* set quoting: false"
    ):
        TableSource(files="t.tsv", label="label").read(tmp_path)
    plain = TableSource(files="t.tsv", label="label", quoting=False).read(tmp_path)
    assert [one.text for one in plain.examples] == ["a", '"b', "c", 'd"', "e"]


def test_a_cell_may_hold_line_ends_and_they_are_counted(tmp_path, write_table, caplog):
    caplog.set_level(logging.INFO)
    rows = [["text", "label"], ["one\ntwo", "pos"], ["three\nfour\t4", "neg"]]
    write_table("t.tsv", rows)
    reading = TableSource(files="t.tsv", label="label").read(tmp_path)
    assert [one.text for one in reading.examples] == ["one\ntwo", "three\nfour\t4"]
    assert "t.tsv: 2 rows, 2 lines more, for cells in quotes hold line ends" in caplog.text


def test_nan_of_a_column_file_is_missing(tmp_path):
    table = pa.table({"text": ["a", "b"], "y": [1.5, float("nan")]})
    parquet.write_table(table, tmp_path / "t.parquet")
    reading = TableSource(files="t.parquet", label="y").read(tmp_path)
    assert [one.label for one in reading.examples] == ["1.5", ""]


def test_a_column_file_with_a_name_twice_is_refused(tmp_path):
    table = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(ConfigError, match=r"t\.parquet: 2 columns are named 'text', expected one"):
        TableSource(files="t.parquet").read(tmp_path)
