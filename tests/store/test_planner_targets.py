"""Targets of a regression or several classes: stored with examples, part of their identity."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline.errors import IntegrityError
from pipeline.provenance import write_json
from pipeline.store.layout import Layout
from pipeline.store.planner import row_digest, write_plan
from pipeline.store.reader import StoreReader
from tests.captured import prepared, signal
from tests.store.synthetic import CHUNK_TOKENS, plan, rows

DESCRIPTION = {
    "spec": {"format": 1},
    "chunk_tokens": CHUNK_TOKENS,
    "task": "multi-label",
    "classes": ["a", "b"],
    "vocab": 50,
    "pad_id": 0,
    "max_length": 8,
}
COUNT = len(plan().row)
TARGETS = (np.arange(2 * COUNT).reshape(COUNT, 2) % 3 == 0).astype(np.float32)


def written(path, targets) -> Layout:
    layout = Layout(path)
    write_json(layout.assets / "teacher" / "config.json", {})
    labels = np.full(COUNT, -1)
    write_plan(layout, plan(), replace(rows(), label=labels, targets=targets), DESCRIPTION)
    return layout


def test_targets_come_back_with_their_examples(tmp_path):
    reader = StoreReader(written(tmp_path, TARGETS).root)
    np.testing.assert_array_equal(reader.targets, TARGETS, strict=True)
    assert reader.plan["outputs"] == 2
    for number in range(len(reader.plan["segments"])):
        reader.read_segment(number)


def test_without_targets_nothing_of_a_store_changes(tmp_path):
    reader = StoreReader(written(tmp_path, None).root)
    assert reader.targets is None
    assert "outputs" not in reader.plan
    assert not any("targets" in name for name in reader.plan["files"])
    tokens = {"input_ids": np.arange(3)}
    assert row_digest(tokens, -1, 4, 0) == row_digest(tokens, -1, 4, 0, None)
    # As of the first store: a changed digest would orphan every store there is.
    assert row_digest(tokens, -1, 4, 0).hex() == "fb1446ae7db604da1387a114b55f6850"


def test_targets_are_part_of_a_rows_identity():
    tokens = {"input_ids": np.arange(3)}
    found = [
        row_digest(tokens, -1, 4, 0, targets)
        for targets in (
            None,
            np.array([0.0], np.float32),
            np.array([1.0], np.float32),
            np.array([1.0, 0.0], np.float32),
        )
    ]
    assert len(set(found)) == len(found)


def test_another_corpus_of_targets_is_another_plan(tmp_path):
    written(tmp_path, TARGETS)
    with pytest.raises(IntegrityError, match="the plan of another corpus"):
        written(tmp_path, TARGETS[:, :1])


@pytest.mark.parametrize(("task", "outputs"), [("regression", 1), ("multi-label", 3)])
def test_a_captured_store_has_the_targets_of_its_rows(tmp_path, task, outputs):
    store = prepared(tmp_path, "bert", task=task, layers=1)
    store.capture([signal("hidden", 1, "int8")])
    from pipeline.corpus.tokens.tokens import TokenSet

    token_set = TokenSet.load(store.tokens)
    reader = store.reader
    targets = reader.targets
    assert targets is not None
    assert targets.shape == (reader.plan["examples"], outputs)
    assert set(reader.examples["label"].tolist()) == {-1}
    splits = ("train", "validation", "test")
    by_row = {
        row["source_row"]: row["targets"] for split in splits for row in token_set.split(split)
    }
    for found, source_row in zip(targets, reader.examples["source_row"], strict=True):
        np.testing.assert_array_equal(found, np.float32(by_row[int(source_row)]))
