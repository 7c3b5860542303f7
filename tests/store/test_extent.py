"""Rows of an axis: examples side by side, and room for the fullest segment."""

import numpy as np
import pytest

from pipeline.axes import Axis
from pipeline.store.extent import PAIR_CHUNK_ROWS, Extent, example_rows, first_rows, segment_extent

LENGTH = np.array([1, 3, 2, 100, 4], np.int32)
SEGMENT = np.array([0, 0, 0, 1, 2])
PLAN = {"segment_tokens": 128, "chunk_tokens": 16, "examples_per_segment": 3}


@pytest.mark.parametrize("rule", ["causal", "full"])
def test_pairs_are_those_that_the_rule_shows(rule):
    for length, rows in zip(LENGTH, example_rows(Axis.PAIR, LENGTH, rule), strict=True):
        seen = np.ones((length, length))
        assert rows == (np.tril(seen) if rule == "causal" else seen).sum()


def test_examples_lie_side_by_side_on_every_axis():
    rows = example_rows(Axis.TOKEN, LENGTH[:3])
    assert first_rows(rows).tolist() == [0, 1, 4]
    assert first_rows(example_rows(Axis.EXAMPLE, LENGTH[:3])).tolist() == [0, 1, 2]
    assert first_rows(example_rows(Axis.PAIR, LENGTH[:3], "full")).tolist() == [0, 1, 10]


def test_room_for_pairs_is_that_of_the_fullest_segment():
    def extent(axis: Axis, rule: str | None = None) -> Extent:
        return segment_extent(axis, PLAN, length=LENGTH, segment=SEGMENT, rule=rule)

    assert extent(Axis.TOKEN) == Extent(128, 16)
    assert extent(Axis.EXAMPLE) == Extent(3, 3)
    assert extent(Axis.PAIR, "full") == Extent(3 * PAIR_CHUNK_ROWS, PAIR_CHUNK_ROWS)
    assert extent(Axis.PAIR, "causal") == Extent(2 * PAIR_CHUNK_ROWS, PAIR_CHUNK_ROWS)
