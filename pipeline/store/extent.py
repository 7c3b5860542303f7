"""Sizes along an axis: the rows of an example, the capacity of a segment, and the rows of a chunk.

They are pure functions of the plan, so writer and readers agree on the shape of every array. On
each axis the examples of a segment follow one another.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.axes import Axis

PAIR_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class Extent:
    """Rows of a shard, which is the capacity of a segment, and of a chunk within it."""

    shard_rows: int
    chunk_rows: int


def example_rows(
    axis: Axis, length: NDArray[np.integer[Any]], rule: str | None = None
) -> NDArray[np.int64]:
    """Return the rows that examples of these lengths have on an axis.

    Args:
        axis: The axis.
        length: Tokens of each example.
        rule: For pairs: `causal` if a query sees itself and the tokens before it, or `full`.
    """
    tokens = length.astype(np.int64)
    match axis:
        case Axis.TOKEN:
            return tokens
        case Axis.EXAMPLE:
            return np.ones_like(tokens)
        case Axis.PAIR:
            assert rule in ("causal", "full")
            return tokens * (tokens + 1) // 2 if rule == "causal" else tokens * tokens


def first_rows(rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the first row of each example in its segment, from the row counts in order."""
    return np.cumsum(rows) - rows


def segment_extent(
    axis: Axis,
    plan: Mapping[str, Any],
    *,
    length: NDArray[np.integer[Any]],
    segment: NDArray[np.integer[Any]],
    rule: str | None = None,
) -> Extent:
    """Return the capacity of a segment on an axis.

    The number of pairs depends on the squares of lengths, so it is that of the fullest segment.

    Args:
        axis: The axis.
        plan: The plan's record, of which `segment_tokens`, `chunk_tokens` and
            `examples_per_segment` are used.
        length: Tokens of every example of the plan.
        segment: The segment of every example.
        rule: For pairs, as in `example_rows`.
    """
    match axis:
        case Axis.TOKEN:
            return Extent(plan["segment_tokens"], plan["chunk_tokens"])
        case Axis.EXAMPLE:
            return Extent(plan["examples_per_segment"], plan["examples_per_segment"])
        case Axis.PAIR:
            rows = np.zeros(int(segment.max()) + 1, dtype=np.int64)
            np.add.at(rows, segment, example_rows(axis, length, rule))
            chunks = -(-int(rows.max()) // PAIR_CHUNK_ROWS)
            return Extent(chunks * PAIR_CHUNK_ROWS, PAIR_CHUNK_ROWS)
