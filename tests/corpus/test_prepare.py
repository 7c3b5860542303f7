import json

import pytest
from pydantic import TypeAdapter

from pipeline.corpus.sources.python_docs import PythonDocsSource
from pipeline.corpus.sources.registry import CorpusSource
from pipeline.corpus.sources.table import TableSource
from pipeline.corpus.sources.text import TextSource
from pipeline.corpus.text.examples import SPLITS, read_corpus_meta, read_split
from pipeline.errors import ConfigError, IntegrityError

NAMES = {"train": "train", "validation": "dev", "test": "test"}


@pytest.fixture
def labelled(write_table):
    """A table source of 40 rows in three classes."""
    rows = [[f"text number {i}", str([2, 10, 1][i % 3])] for i in range(40)]
    write_table("t.tsv", [["text", "y"], *rows])
    return TableSource(files="t.tsv", label="y")


@pytest.fixture
def lines(tmp_path):
    """A text source of 60 lines."""
    (tmp_path / "t.txt").write_text("\n".join(f"line number {i} of the text" for i in range(60)))
    return TextSource(files="t.txt", examples="line")


def files_below(path):
    return {one.relative_to(path): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def test_the_same_source_gives_the_same_bytes_and_another_seed_others(tmp_path, prepare, lines):
    first = prepare(lines, output="a")
    assert prepare(lines, output="b") == first
    assert files_below(tmp_path / "a") == files_below(tmp_path / "b")
    assert prepare(lines, output="b", seed=1).digest != first.digest


def test_what_is_written_is_what_is_read(tmp_path, prepare, labelled):
    meta = prepare(labelled, "classification")
    assert read_corpus_meta(tmp_path / "text") == meta
    splits = {split: read_split(tmp_path / "text", split) for split in SPLITS}
    assert {split: len(rows) for split, rows in splits.items()} == meta.rows
    assert meta.rows == {"train": 32, "validation": 4, "test": 4}
    found = sorted((row["source_row"], row["text"]) for rows in splits.values() for row in rows)
    assert found == [(i, f"text number {i}") for i in range(40)]
    assert meta.text_bytes["test"] == sum(len(row["text"]) for row in splits["test"])


def test_classes_are_those_of_training_by_value_or_as_given(prepare, labelled, write_table):
    assert prepare(labelled, "classification").classes == ("1", "2", "10")
    assert prepare(labelled, "classification", ["10", "1", "2"]).classes == ("10", "1", "2")
    write_table("w.csv", [["text", "y"], *([f"t {i}", "ba"[i % 2]] for i in range(20))])
    words = TableSource(files="w.csv", label="y")
    assert prepare(words, "classification").classes == ("a", "b")


def test_a_limit_holds_for_every_split(prepare, lines):
    assert prepare(lines.model_copy(update={"limit": 3})).rows == dict.fromkeys(SPLITS, 3)


def test_the_kind_chooses_the_source():
    adapter = TypeAdapter(CorpusSource)
    assert adapter.validate_python({"kind": "python-docs"}) == PythonDocsSource()
    assert isinstance(adapter.validate_json('{"kind": "table", "files": ["a.tsv"]}'), TableSource)
    split = adapter.validate_json('{"kind": "text", "files": {"train": ["a", "b"], "test": "c"}}')
    assert split.files == {"train": ("a", "b"), "test": "c"}


def test_a_label_outside_the_classes_names_file_row_and_classes(prepare, labelled):
    with pytest.raises(
        ConfigError, match=r"t\.tsv:\d+: label '10' in a \w+ row, expected one of '1', '2'"
    ):
        prepare(labelled, "classification", ["1", "2"])


def test_a_row_without_label_is_named(prepare, write_table):
    write_table(
        "t.tsv", [["text", "y"], *([f"t {i}", "" if i == 7 else str(i % 2)] for i in range(20))]
    )
    with pytest.raises(ConfigError, match=r"t\.tsv:9: no label in a \w+ row"):
        prepare(TableSource(files="t.tsv", label="y"), "classification", ["0", "1"])


@pytest.mark.parametrize(
    ("source", "task", "classes", "message"),
    [
        (
            PythonDocsSource(),
            "classification",
            None,
            "needs labels and the source python-docs names none",
        ),
        (
            TableSource(files="t.tsv", pair="y"),
            "causal-lm",
            None,
            "corpus.source.pair: 'y' makes pairs",
        ),
        (
            TableSource(files="t.tsv"),
            "causal-lm",
            ["a", "b"],
            "corpus.classes: 2 classes for task causal-lm",
        ),
        (
            TableSource(files="t.tsv", label="y"),
            "classification",
            ["a", "a"],
            "two or more different",
        ),
        (TableSource(files="none.tsv"), "causal-lm", None, r"none\.tsv: cannot be read"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path, prepare, lines, source, task, classes, message
):
    prepare(lines)
    before = files_below(tmp_path)
    with pytest.raises(ConfigError, match=message):
        prepare(source, task, classes)
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("share", [0.0, 0.5, float("nan")])
def test_a_share_that_is_none_is_refused(prepare, lines, share):
    with pytest.raises(ConfigError, match=r"corpus\.validation_share: found"):
        prepare(lines, share=share)


def test_one_class_is_no_task(prepare, write_table):
    write_table("t.tsv", [["text", "y"], *([f"t {i}", "1"] for i in range(20))])
    with pytest.raises(ConfigError, match="the single class '1'"):
        prepare(TableSource(files="t.tsv", label="y"), "classification")


def test_a_damaged_corpus_is_an_integrity_error(tmp_path, prepare, lines):
    prepare(lines)
    (tmp_path / "text" / "corpus.json").write_text("{}")
    with pytest.raises(
        IntegrityError, match=r"corpus\.json: key task: Field required; run `decant prepare`"
    ):
        read_corpus_meta(tmp_path / "text")
    with pytest.raises(IntegrityError, match="not a readable dataset"):
        read_split(tmp_path / "text" / "nowhere", "train")


def test_glue_without_a_labelled_test_split_is_measured_on_dev(prepare, real_corpora):
    folder = real_corpora / "cola"
    source = TableSource(
        files={"train": str(folder / "train.tsv.gz"), "validation": str(folder / "dev.tsv.gz")},
        text="sentence",
        label="label",
        quoting=False,
    )
    meta = prepare(source, "classification", share=0.05)
    assert meta.rows["test"] == 1043
    assert meta.splits == {"train": "carved", "validation": "carved", "test": "validation"}
    assert 350 < meta.rows["validation"] < 430


def write_rows(path, rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))


@pytest.mark.parametrize(
    ("task", "columns", "row"),
    [
        ("prompt-target", {"target": "to"}, lambda i: {"text": f"t {i}", "to": [f"o {i}", "p"]}),
        ("multi-label", {"labels": "y"}, lambda i: {"text": f"t {i}", "y": ["a", "b"][: i % 3]}),
        ("regression", {"label": "y"}, lambda i: {"text": f"t {i}", "y": i / 4}),
        (
            "messages",
            {"messages": "m"},
            lambda i: {"m": [{"role": r, "content": f"{r} {i}"} for r in ("user", "assistant")]},
        ),
    ],
)
def test_every_task_is_written_and_read_back(tmp_path, prepare, task, columns, row):
    write_rows(tmp_path / "t.jsonl", map(row, range(40)))
    meta = prepare(TableSource(files="t.jsonl", **columns), task)
    assert (meta.task, sum(meta.rows.values())) == (task, 40)
    assert meta.rows == {"train": 32, "validation": 4, "test": 4}
    assert meta.classes == (("a", "b") if task == "multi-label" else ())
    found = {one["source_row"]: one for s in SPLITS for one in read_split(tmp_path / "text", s)}
    one = found[5]
    expected = {
        "prompt-target": {"text": "t 5", "target": "o 5", "references": ["o 5", "p"]},
        "multi-label": {"text": "t 5", "labels": ["a", "b"]},
        "regression": {"text": "t 5", "label": "1.25"},
        "messages": {"messages": row(5).get("m"), "references": ["assistant 5"]},
    }[task]
    assert {key: one[key] for key in expected} == expected
    assert found[3]["labels"] == ([] if task == "multi-label" else None)
    assert meta.text_bytes["train"] > 100


def test_what_a_model_learns_changes_the_digest_and_columns_of_other_tasks_do_not(
    tmp_path, prepare
):
    def digest(**row):
        write_rows(tmp_path / "t.jsonl", [{"text": f"t {i}", **row} for i in range(20)])
        target = {"target": "to"} if "to" in row else {}
        task = "prompt-target" if target else "causal-lm"
        return prepare(TableSource(files="t.jsonl", **target), task).digest

    assert len({digest(to="a"), digest(to="b"), digest(to=["a", "b"]), digest()}) == 4
    assert digest(other="x") == digest()


def test_rows_without_a_target_are_left_out_and_counted(tmp_path, prepare):
    rows = [{"text": f"t {i}", "to": "" if i % 10 == 0 else "o"} for i in range(40)]
    write_rows(tmp_path / "t.jsonl", rows)
    meta = prepare(TableSource(files="t.jsonl", target="to"), "prompt-target")
    assert meta.dropped == {"no_target": 4}
    assert sum(meta.rows.values()) == 36


def test_real_scores_and_real_translations_are_prepared(prepare, real_corpora):
    files = {split: str(real_corpora / "sick" / f"{name}.tsv.gz") for split, name in NAMES.items()}
    sick = TableSource(
        files=files, text="sentence1", pair="sentence2", label="score", quoting=False, limit=50
    )
    meta = prepare(sick, "regression")
    assert (meta.has_pairs, meta.classes, meta.rows["test"]) == (True, (), 50)
    # The training file is long: the development file takes its place.
    files = {"train": str(real_corpora / "cmudict-g2p" / "dev.tsv.gz")}
    g2p = TableSource(
        files=files, text="word", target="phonemes", alternatives=" | ", quoting=False, limit=50
    )
    assert prepare(g2p, "prompt-target").rows == dict.fromkeys(SPLITS, 50)
