"""Reads and decodes segments in threads, each once for all data sets that need it at that time."""

import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from weakref import WeakValueDictionary

from pipeline.store.reader import Segment, StoreReader

THREADS = max(1, min(4, (os.cpu_count() or 1) - 1))
"""Checking and decompressing release the interpreter; one core is left for training."""


class SegmentReads:
    """Reads the segments of a store for one or several data sets, each segment with all signals.

    A segment is remembered as long as a caller holds the future that `get` returned. It is also
    kept here until every user has asked for it: a user that builds batches ahead may have dropped
    it before the others need it. Threads of one process may share it; its own threads end when it
    is closed or collected.

    Args:
        reader: The store.
        signals: Names of the signals that segments carry: those of all users.
        users: How many data sets share the reads and go through the segments in the same order.
        most_kept: The most segments that are kept for slower users.
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
        # Each with the number of users that have not asked yet; the last requested comes last.
        self._kept: dict[int, tuple[Future[Segment], int]] = {}
        self._lock = Lock()

    def get(self, number: int) -> "Future[Segment]":
        """Return the future of a segment; the read is queued if there was none.

        Its result raises what `StoreReader.read_segment` raises; a read that failed is not tried
        again while its future is held.
        """
        with self._lock:
            segment = self._remembered.get(number)
            if segment is None:
                segment = self._threads.submit(self.reader.read_segment, number, self.signals)
                self._remembered[number] = segment
            _, missing = self._kept.pop(number, (segment, self._users))
            if missing > 1:
                self._kept[number] = segment, missing - 1
            while len(self._kept) > self._most_kept:
                del self._kept[next(iter(self._kept))]
            return segment

    def leave(self) -> None:
        """Remove one of the users, which asks for nothing more."""
        with self._lock:
            self._users -= 1
            self._kept.clear()

    def close(self) -> None:
        """End the threads and cancel queued reads; nothing more can be read."""
        self._threads.shutdown(wait=True, cancel_futures=True)
