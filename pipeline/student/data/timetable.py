"""When an epoch needs which segments: decides what is read ahead and what is dropped."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


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
