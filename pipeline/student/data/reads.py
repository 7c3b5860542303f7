"""Segments read and decoded in threads, each once for all who use it at the same time."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from weakref import WeakValueDictionary

from pipeline.store.reader import Segment, StoreReader

THREADS = max(1, min(4, (os.cpu_count() or 1) - 1))
"""Reading releases the interpreter while it checks and decompresses; training needs a core, too."""


class SegmentReads:
    """Reads the segments of a store for one or several data sets, each with all of the signals.

    A segment is remembered as long as one who asked for it holds what `get` gave. Until every user
    has asked for it, it is kept here, too: who builds batches ahead has let go of a segment before
    the others come to it. For the threads of one process; they end when this object is closed or
    gone.

    Args:
        reader: The store.
        signals: Names of the signals that segments carry: those of all who share the reads.
        users: How many share the reads and go through the segments in the same order.
        most_kept: Segments that are kept at most for users who come later.
        threads: How many segments are decoded at a time.
    """

    def __init__(
        self,
        reader: StoreReader,
        signals: Sequence[str],
        *,
        users: int = 1,
        most_kept: int = 0,
        threads: int = THREADS,
    ) -> None:
        self.reader = reader
        self.signals = list(signals)
        self._users = users
        self._most_kept = most_kept
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="segment-reader")
        self._remembered: WeakValueDictionary[int, Future[Segment]] = WeakValueDictionary()
        # With how many users have not asked yet; who was asked for last comes last.
        self._kept: dict[int, tuple[Future[Segment], int]] = {}
        self._lock = Lock()

    def get(self, number: int) -> "Future[Segment]":
        """Return a segment that is read, being read, or now queued to be read.

        Its result raises what `StoreReader.read_segment` raises; a read that failed is not tried
        again while its future is held.
        """
        with self._lock:
            found = self._remembered.get(number)
            if found is None:
                found = self._threads.submit(self.reader.read_segment, number, self.signals)
                self._remembered[number] = found
            _, missing = self._kept.pop(number, (found, self._users))
            if missing > 1:
                self._kept[number] = found, missing - 1
            while len(self._kept) > self._most_kept:
                del self._kept[next(iter(self._kept))]
            return found

    def leave(self) -> None:
        """Say that one of the users asks for nothing more."""
        with self._lock:
            self._users -= 1
            self._kept.clear()

    def close(self) -> None:
        """Let the threads end; nothing more can be asked for. Reads that wait are given up."""
        self._threads.shutdown(wait=True, cancel_futures=True)
