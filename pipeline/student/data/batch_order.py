"""The order of the examples in training: a pure function of seed and epoch, planned as arrays.

An epoch's segments, in random order, are dealt to lanes. A lane mixes its segments a few at a time,
and every batch takes the same number of examples from each lane. So a batch is a mixture of many
segments while few are in memory, and a rank with lanes of its own reads no segment of another rank.
The order is planned without reading: a resumed run skips batches without decoding them.
"""

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Timetable:
    """When one rank needs which segment in an epoch, in batches counted from 0.

    Attributes:
        segments: The segments it needs, in order of first need.
        first: The batch that needs each first, [segments], rising.
        last: The last batch that needs each, [segments].
        batch: The batch of every example, [examples]; -1 for examples of another rank.
        together: Segments that the rank mixes at a time.
    """

    segments: NDArray[np.int64]
    first: NDArray[np.int64]
    last: NDArray[np.int64]
    batch: NDArray[np.int64]
    together: int


def make_timetable(
    segment: NDArray[np.int64],
    members: NDArray[np.int64],
    starts: NDArray[np.int64],
    *,
    together: int,
) -> Timetable:
    """Return the timetable of batches that follow each other in `members`.

    Args:
        segment: The segment of every example, [examples].
        members: The examples of all batches, one batch after the other.
        starts: Where each batch begins in `members`, and where the last one ends, [batches + 1].
        together: Segments that are mixed at a time.
    """
    number = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    batch = np.full(len(segment), -1, np.int64)
    batch[members] = number
    needed = segment[members]
    last = np.full(int(segment.max(initial=-1)) + 1, -1, np.int64)
    first = last.copy()
    # If an index occurs twice the last value stays.
    last[needed] = number
    first[needed[::-1]] = number[::-1]
    segments = np.flatnonzero(last >= 0)
    segments = segments[np.argsort(first[segments], kind="stable")]
    return Timetable(segments, first[segments], last[segments], batch, together)


WINDOW_BATCHES = 8
"""Batches whose examples are sorted by length together: less padding, but still well mixed."""


Lanes = TypeVar("Lanes", list[list[int]], NDArray[np.int64])


class _Share(NamedTuple):
    """One rank's examples of an epoch, batch after batch, and where each batch begins."""

    members: NDArray[np.int64]
    starts: NDArray[np.int64]


class BatchOrder(Sampler[list[int]]):
    """The batches of an epoch as lists of examples: a batch sampler for a `DataLoader`.

    Every epoch has every example once, in the same number of batches. All have the same size,
    except the last two, which share the remainder.

    On several ranks a batch of all ranks is planned and each takes its share, so n ranks run the
    batches that one rank with n times the batch size runs. (One exception: with a batch size of 1,
    a remainder smaller than the number of ranks joins the last batch, because each rank needs an
    example.) If the number of ranks divides the number of lanes, each rank has lanes of its own. It
    then shares segments with others only in the epoch's last batches, made of what is left when the
    first lane has run out. A share is sorted, longest example first.
    """

    def __init__(
        self,
        segment: NDArray[np.int64],
        length: NDArray[np.int64],
        *,
        batch_size: int,
        pool_segments: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Plan epochs over examples.

        Args:
            segment: Each example's segment.
            length: Each example's tokens.
            batch_size: Examples in a batch of one rank.
            pool_segments: Segments that are mixed together, over all ranks.
            seed: Seed of the order.
            rank: The rank whose share is iterated.
            ranks: The number of ranks.

        Raises:
            ConfigError: If there are fewer examples than ranks.
        """
        if len(segment) < ranks:
            raise ConfigError(
                f"the store has {len(segment)} training examples for {ranks} ranks; expected at "
                "least one each"
            )
        self._segment = segment
        self._length = length
        self._batch = batch_size * ranks
        self._seed = seed
        self._rank, self._ranks = rank, ranks
        self._epoch = 0
        self._planned: tuple[int, _Share] | None = None
        by_segment = np.argsort(segment, kind="stable")
        numbers, first = np.unique(segment[by_segment], return_index=True)
        self._members = np.split(by_segment, first[1:].tolist())
        # Depends on batch and pool alone: the batches must be the same for any number of ranks.
        most = min(pool_segments, len(numbers))
        self._lanes = max(n for n in range(1, most + 1) if self._batch % n == 0)
        self._mixed_segments = pool_segments // self._lanes
        self._has_own_lanes = self._lanes % ranks == 0

    def __len__(self) -> int:
        full, rest = divmod(len(self._length), self._batch)
        joins = self._batch == self._ranks and full > 0
        return full + (rest > 0 and not joins)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is iterated next."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        members, starts = self._share()
        return (members[start:stop].tolist() for start, stop in pairwise(starts.tolist()))

    def next_segments(self) -> list[int]:
        """Return the segments that this rank needs first in the epoch after this one."""
        lanes = self._deal(np.random.default_rng([self._seed, self._epoch + 1]))
        first = [lane[: self._mixed_segments] for lane in self._own(lanes)]
        return [int(self._segment[self._members[n][0]]) for lane in first for n in lane]

    def timetable(self) -> Timetable:
        """Return the timetable of this rank's batches in the epoch."""
        members, starts = self._share()
        lanes = self._lanes // self._ranks if self._has_own_lanes else self._lanes
        together = lanes * self._mixed_segments
        return make_timetable(self._segment, members, starts, together=together)

    def _share(self) -> _Share:
        if self._planned is None or self._planned[0] != self._epoch:
            self._planned = self._epoch, self._plan()
        return self._planned[1]

    def _plan(self) -> _Share:
        generator = np.random.default_rng([self._seed, self._epoch])
        lanes = [self._stream(numbers, generator) for numbers in self._deal(generator)]
        size = self._batch // len(lanes)
        count = min(len(lane) for lane in lanes) // size
        if count and 0 < len(self._length) - count * self._batch < self._batch:
            # A rest too small for a batch, or for the ranks, shares with this one.
            count -= 1
        body = self._body(np.stack([lane[: count * size] for lane in lanes]), count, generator)
        rest = np.concatenate([lane[count * size :] for lane in lanes])
        tail = [batch[self._rank :: self._ranks] for batch in self._tail(rest, generator)]
        sizes = [body.shape[1]] * count + [len(share) for share in tail]
        return _Share(
            np.concatenate([body.ravel(), *tail]),
            np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes, dtype=np.int64)]),
        )

    def _deal(self, generator: np.random.Generator) -> list[list[int]]:
        """Deal the segments, in random order, each to the lane with the fewest examples so far."""
        lanes: list[list[int]] = [[] for _ in range(self._lanes)]
        filled = [(0, lane) for lane in range(self._lanes)]
        for number in generator.permutation(len(self._members)).tolist():
            count, lane = filled[0]
            heapq.heapreplace(filled, (count + len(self._members[number]), lane))
            lanes[lane].append(number)
        return lanes

    def _own(self, lanes: Lanes) -> Lanes:
        """Return the lanes that this rank takes examples from."""
        own = len(lanes) // self._ranks if self._has_own_lanes else 0
        return lanes[self._rank * own : (self._rank + 1) * own] if own else lanes

    def _stream(self, numbers: list[int], generator: np.random.Generator) -> NDArray[np.int64]:
        """Return a lane's examples: those of a few segments mixed, then those of the next few."""
        members = [self._members[number] for number in numbers]
        group = np.repeat(
            np.arange(len(members)) // self._mixed_segments, [len(examples) for examples in members]
        )
        mixed = np.argsort(group + generator.random(len(group)), kind="stable")
        return np.concatenate(members)[mixed]

    def _body(
        self, lanes: NDArray[np.int64], count: int, generator: np.random.Generator
    ) -> NDArray[np.int64]:
        """Return this rank's share of the `count` batches that all lanes fill, [batches, share]."""
        size = self._batch // len(lanes)
        window = np.arange(count) // self._window(size)
        mixed = np.argsort(window + generator.random(count), kind="stable")
        lanes = self._own(lanes)
        longest = int(self._length.max())
        # The i-th cuts of all lanes, sorted by length in a window, make a batch.
        keys = np.repeat(window, size) * (longest + 1) - self._length[lanes]
        cuts = np.take_along_axis(lanes, np.argsort(keys, axis=1, kind="stable"), axis=1)
        batches = cuts.reshape(len(lanes), count, size).swapaxes(0, 1)
        batches = batches.reshape(count, len(lanes) * size)[mixed]
        order = np.argsort(-self._length[batches], axis=1, kind="stable")
        batches = np.take_along_axis(batches, order, axis=1)
        return batches if self._has_own_lanes else batches[:, self._rank :: self._ranks]

    def _window(self, size: int) -> int:
        """Return how many batches to sort together without needing many more segments at a time."""
        mixed = len(self._length) / len(self._members) * self._mixed_segments
        return max(1, min(WINDOW_BATCHES, int(mixed // size)))

    def _tail(
        self, rest: NDArray[np.int64], generator: np.random.Generator
    ) -> Iterator[NDArray[np.int64]]:
        """Yield the batches of all ranks that the lanes' rest makes, longest example first."""
        mixed = generator.permutation(rest)
        sizes = self._sizes(len(mixed))
        for first in range(0, len(sizes), WINDOW_BATCHES):
            part = sizes[first : first + WINDOW_BATCHES]
            start = sum(sizes[:first])
            members = mixed[start : start + sum(part)]
            members = members[np.argsort(-self._length[members], kind="stable")]
            batches = np.split(members, np.cumsum(part)[:-1])
            for i in generator.permutation(len(batches)).tolist():
                yield batches[i]

    def _sizes(self, count: int) -> list[int]:
        """Return the sizes of the batches of `count` examples: the last two share the rest."""
        full, rest = divmod(count, self._batch)
        if not rest or not full:
            return [self._batch] * full + [rest] * (rest > 0)
        half = (self._batch + rest) // 2
        ends = [self._batch + rest - half, half] if half >= self._ranks else [self._batch + rest]
        return [self._batch] * (full - 1) + ends
