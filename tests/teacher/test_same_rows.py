"""The rows of a store against a corpus: which are equal, and in what the others differ."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.corpus.text.examples import SPLITS
from pipeline.corpus.tokens.tokens import TokenColumns, TokenSet, write_tokens
from pipeline.teacher.capture.same_rows import RowsFound, compare_rows
from tests.captured import Captured, prepared, signal
from tests.store.fixtures import without_sync

TRAIN = 14


@pytest.fixture(scope="module")
def captured(tmp_path_factory) -> Captured:
    with without_sync():
        found = prepared(tmp_path_factory.mktemp("rows"), "bert")
        found.capture([signal("logits", None, "dense")])
    return found


def columns_of(tokens: TokenSet) -> dict[str, list[dict]]:
    """Rows of every split as plain values."""
    return {split: list(tokens.split(split).with_format("numpy")) for split in SPLITS}


def written(path: Path, tokens: TokenSet, rows: dict[str, list[dict]], **meta) -> TokenSet:
    """A token set of changed rows that still says to be the old one."""
    splits = {}
    for split in SPLITS:
        lengths = [len(row["input_ids"]) for row in rows[split]]

        def joined(column: str, kind: type, split: str = split) -> np.ndarray:
            return np.concatenate([np.asarray(row[column], kind) for row in rows[split]])

        def each(column: str, kind: type, split: str = split) -> np.ndarray:
            return np.array([row[column] for row in rows[split]], kind)

        splits[split] = TokenColumns(
            offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            input_ids=joined("input_ids", np.int32),
            loss_mask=joined("loss_mask", np.bool_),
            token_type_ids=joined("token_type_ids", np.int8),
            source_row=each("source_row", np.int64),
            piece=each("piece", np.int32),
            label=each("label", np.int64),
        )
    counts = {split: len(rows[split]) for split in SPLITS}
    write_tokens(path, splits, tokens.meta.model_copy(update={"rows": counts, **meta}))
    return TokenSet.load(path)


@pytest.fixture
def compare(captured, tmp_path):
    """Return a function that changes the corpus and compares the store with what comes of it."""

    def run(change=lambda rows: None, **meta) -> RowsFound:
        tokens = TokenSet.load(captured.tokens)
        rows = columns_of(tokens)
        change(rows)
        return compare_rows(captured.reader, written(tmp_path / "corpus", tokens, rows, **meta))

    return run


def test_the_corpus_of_the_store_is_the_same(captured, compare):
    expected = RowsFound(20, 0, 0, 0, 0, ())
    assert compare_rows(captured.reader, TokenSet.load(captured.tokens)) == expected
    assert expected.is_same
    assert compare() == expected


def test_an_edited_label_is_said_with_both_values(compare):
    def change(rows):
        rows["train"][7]["label"] = 1 - rows["train"][7]["label"]

    found = compare(change)
    assert (found.equal, found.altered) == (19, 1)
    assert not found.is_same
    (line,) = found.lines
    assert line in {f"train row 7: label {a} in the store, {1 - a} in the corpus" for a in (0, 1)}


def test_other_ids_are_said_from_where_they_differ(compare):
    def change(rows):
        rows["test"][2]["input_ids"] = np.array([*rows["test"][2]["input_ids"][:12], 5, 5, 5])

    (line,) = compare(change).lines
    assert line.startswith("test row 2: input_ids from position 12 ")
    assert line.endswith("in the store, 5 in the corpus")


def test_a_row_cut_shorter_is_said_with_both_lengths(compare):
    def change(rows):
        row = rows["validation"][1]
        for column in ("input_ids", "loss_mask", "token_type_ids"):
            row[column] = row[column][:8]

    (line,) = compare(change).lines
    assert line == "validation row 1: tokens 12 in the store, 8 in the corpus"


def test_reordered_rows_are_recognised(compare):
    def change(rows):
        rows["train"].reverse()

    found = compare(change)
    assert (found.equal, found.moved, found.altered, found.missing) == (6, TRAIN, 0, 0)
    assert found.lines[0] == "train row 0: is row 13 of the corpus"


def test_rows_that_were_sorted_before_they_were_numbered_are_recognised(compare):
    def change(rows):
        rows["train"] = [
            {**row, "source_row": place} for place, row in enumerate(reversed(rows["train"]))
        ]

    assert compare(change).moved == TRAIN


def test_rows_taken_out_and_put_in(compare):
    def fewer(rows):
        del rows["train"][-2:]

    found = compare(fewer)
    assert (found.equal, found.missing, found.added) == (18, 2, 0)
    assert found.lines[0] == "train row 12: is not in the corpus, which has 12"

    def more(rows):
        rows["train"].append({**rows["train"][0], "label": 1, "source_row": 99})

    found = compare(more)
    assert (found.equal, found.added) == (20, 1)
    assert found.lines == ("train row 14 of the corpus is not in the store",)


def test_rows_that_changed_places_but_not_their_source_rows_are_moved(compare):
    def change(rows):
        one, other = rows["train"][3], rows["train"][4]
        rows["train"][3], rows["train"][4] = (
            {**other, "source_row": one["source_row"]},
            {**one, "source_row": other["source_row"]},
        )

    assert compare(change).moved == 2


def test_settings_that_differ_are_said(compare):
    found = compare(tokenizer_digest="another", max_length=16)
    assert found.equal == 20
    assert not found.is_same
    assert found.lines == (
        "tokenizer: tiny in the store, another in the corpus",
        "max_length: 32 in the store, 16 in the corpus",
    )


def test_a_share_of_the_corpus_is_compared_as_a_share(tmp_path):
    store = prepared(tmp_path, "bert")
    options = replace(store.options, fraction=0.5)
    store.capture([signal("logits", None, "dense")], options=options)
    found = compare_rows(store.reader, TokenSet.load(store.tokens))
    assert found == RowsFound(13, 0, 0, 0, 0, ())
