"""The segment plan: the place of every example on the token axis.

The examples of a split are permuted once, with a seed, and dealt in that order to segments of fixed
capacity. A segment holds complete examples of one split. The plan is a pure function of lengths,
splits and options, so every later run, worker and reader agrees on it without communication.

Training text that is added later is a *part* of its own. It is permuted by itself and starts with a
new segment, so the segments of earlier parts do not change.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.axes import SPLITS, TRAIN
from pipeline.errors import ConfigError

Ints: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class Plan:
    """The place of every example. Arrays are in store order: by segment, then by `start`.

    Attributes:
        segment_tokens: Capacity of a segment in tokens.
        split: Code of each example's split, its position in `SPLITS`.
        row: The example's row in its tokenised split.
        start: Its first token on the token axis.
        length: Its tokens.
        segment: Its segment.
        slot: Its position within its segment.
        segment_split: Code of each segment's split.
        parts: Segments of each part of the training split.
    """

    segment_tokens: int
    split: Ints
    row: Ints
    start: Ints
    length: Ints
    segment: Ints
    slot: Ints
    segment_split: Ints
    parts: tuple[int, ...]

    @property
    def segments(self) -> int:
        """The number of segments."""
        return len(self.segment_split)

    @property
    def examples_per_segment(self) -> int:
        """Capacity of a segment on the example axis."""
        return int(self.slot.max()) + 1

    def in_segment(self, segment: int) -> slice:
        """Return the range of the examples of `segment`."""
        first, last = np.searchsorted(self.segment, [segment, segment + 1])
        return slice(int(first), int(last))

    def segments_of(self, split: str) -> list[int]:
        """Return the segments of `split`."""
        return np.flatnonzero(self.segment_split == SPLITS.index(split)).tolist()


def _chosen(
    parts: Sequence[int], split: str, fraction: float, limit: int | None, seed: int
) -> Iterator[Ints]:
    """Permute the rows of each part of a split; reduce training to the requested transfer set."""
    first = 0
    for part, rows in enumerate(parts):
        # The first part is seeded like a split without parts, whose plans must not change.
        generator = np.random.default_rng([seed, SPLITS.index(split), *([part] if part else [])])
        order = first + generator.permutation(rows).astype(np.int64)
        first += rows
        if split == TRAIN:
            keep = max(1, round(rows * fraction))
            order = order[: keep if limit is None else min(keep, limit)]
            limit = None if limit is None else limit - len(order)
        yield order


def make_plan(
    lengths: dict[str, Ints],
    *,
    segment_tokens: int,
    seed: int,
    fraction: float = 1.0,
    limit: int | None = None,
    parts: Sequence[int] = (),
) -> Plan:
    """Deal the examples of every split to segments.

    Args:
        lengths: Tokens of each example, by split.
        segment_tokens: Capacity of a segment in tokens.
        seed: Seed of the permutation.
        fraction: Share of the training examples to capture, in each part.
        limit: Most training examples to capture; earlier parts come first.
        parts: Rows of each part of the training split, in order; empty for a single part.

    Raises:
        ConfigError: If an example is empty or longer than a segment, or none is for training.
    """
    count = len(lengths.get(TRAIN, ()))
    if not count:
        raise ConfigError("corpus: 0 training examples after tokenising; expected at least 1")
    parts = parts or (count,)
    assert sum(parts) == count
    columns: dict[str, list[int]] = {
        key: [] for key in ("split", "row", "start", "length", "segment", "slot")
    }
    segment_split: list[int] = []
    part_segments: list[int] = []
    for code, split in enumerate(SPLITS):
        split_lengths = lengths.get(split)
        if split_lengths is None or not len(split_lengths):
            continue
        if split_lengths.min() < 1:
            raise ConfigError(
                f"corpus: example {int(split_lengths.argmin())} of {split} has 0 tokens; expected "
                "at least 1"
            )
        longest = int(split_lengths.max())
        if longest > segment_tokens:
            raise ConfigError(
                f"capture.segment_tokens: {segment_tokens}, but an example of {split} has "
                f"{longest} tokens; expected room for a complete example: raise segment_tokens"
            )
        of_split = parts if split == TRAIN else (len(split_lengths),)
        for rows in _chosen(of_split, split, fraction, limit, seed):
            before = len(segment_split)
            used, slot = segment_tokens + 1, 0
            for row in rows.tolist():
                length = int(split_lengths[row])
                if used + length > segment_tokens:
                    segment_split.append(code)
                    used, slot = 0, 0
                segment = len(segment_split) - 1
                place = (code, row, segment * segment_tokens + used, length, segment, slot)
                for column, value in zip(columns.values(), place, strict=True):
                    column.append(value)
                used, slot = used + length, slot + 1
            if split == TRAIN:
                part_segments.append(len(segment_split) - before)
    arrays = {key: np.asarray(values, dtype=np.int64) for key, values in columns.items()}
    return Plan(
        segment_tokens=segment_tokens,
        segment_split=np.asarray(segment_split, dtype=np.int64),
        parts=tuple(part_segments),
        **arrays,
    )


def bucketed_batches(lengths: Ints, batch_tokens: int) -> list[Ints]:
    """Group a segment's examples into batches of similar length, longest first.

    A batch has at most `batch_tokens` tokens, padding included, and at least one example. The
    result depends only on the arguments: a segment always runs in the same batches.
    """
    order = np.argsort(-lengths, kind="stable")
    batches: list[Ints] = []
    position = 0
    while position < len(order):
        size = max(1, batch_tokens // int(lengths[order[position]]))
        batches.append(order[position : position + size])
        position += size
    return batches
