"""Compresses and writes shards in background threads, with bounds on the jobs that wait."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType

MOST_BYTES = 4 * 2**30
"""Bytes of unfinished jobs, of which there may be one alone that is larger."""


class BackgroundWriter:
    """Runs write jobs in a few threads.

    The next `submit`, or else the end of the block, raises the first failure. After a failure no
    waiting job starts; running jobs finish, so what they committed stays complete.

    Args:
        threads: Threads that run jobs.
        pending: The most unfinished jobs; None: one more than threads.
        most_bytes: The most bytes of unfinished jobs; a larger one runs alone.
    """

    def __init__(
        self, *, threads: int = 1, pending: int | None = None, most_bytes: int = MOST_BYTES
    ) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="shard-writer")
        self._most_jobs = pending or threads + 1
        self._most_bytes = most_bytes
        self._jobs = self._bytes = 0
        self._changed = threading.Condition()
        self._failure: BaseException | None = None

    def submit(self, job: Callable[[], object], size: int = 0) -> None:
        """Queue a job that holds `size` bytes; block while it is not within the bounds.

        Raises:
            BaseException: The error of an earlier job.
            RuntimeError: If the block has ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None or self._has_room(size))
            if self._failure is not None:
                raise self._failure
            self._jobs, self._bytes = self._jobs + 1, self._bytes + size
        try:
            future = self._executor.submit(self._run, job)
        except RuntimeError:
            self._release(size)
            raise
        # Also called for cancelled jobs, so that no thread waits for room for ever.
        future.add_done_callback(lambda _: self._release(size))

    def _has_room(self, size: int) -> bool:
        return not self._jobs or (
            self._jobs < self._most_jobs and self._bytes + size <= self._most_bytes
        )

    def _release(self, size: int) -> None:
        with self._changed:
            self._jobs, self._bytes = self._jobs - 1, self._bytes - size
            self._changed.notify_all()

    def _run(self, job: Callable[[], object]) -> None:
        if self._failure is not None:
            return
        try:
            job()
        except BaseException as error:
            if self._failure is None:
                self._failure = error
            raise

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._executor.shutdown(wait=True, cancel_futures=error is not None)
        if self._failure is not None and error is None:
            raise self._failure
