"""Shards are compressed and written off the compute thread, with a bound on what may pile up."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self


class BackgroundWriter:
    """Runs write jobs in a few threads; at most `pending` jobs wait or run at once.

    The first failure is raised by the next `submit` or at the end of the block; jobs that were
    already running finish, so what they committed stays whole.
    """

    def __init__(self, *, threads: int = 1, pending: int = 2) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="shard-writer")
        self._slots = threading.BoundedSemaphore(pending)
        self._failure: BaseException | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Queue a job; blocks while `pending` jobs are unfinished.

        Raises:
            BaseException: What an earlier job raised.
        """
        self._slots.acquire()
        if self._failure is not None:
            self._slots.release()
            raise self._failure
        self._executor.submit(job).add_done_callback(self._done)

    def _done(self, future: Future[object]) -> None:
        error = future.exception()
        if error is not None and self._failure is None:
            self._failure = error
        self._slots.release()

    def __enter__(self) -> Self:
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
