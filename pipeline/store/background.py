"""Compresses and writes shards in background threads, with a bound on the waiting jobs."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType


class BackgroundWriter:
    """Runs write jobs in a few threads; at most `pending` jobs wait or run at a time.

    The next `submit`, or else the end of the block, raises the first failure. After a failure no
    waiting job starts; running jobs finish, so what they committed stays complete.
    """

    def __init__(self, *, threads: int = 1, pending: int = 2) -> None:
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="shard-writer")
        self._slots = threading.BoundedSemaphore(pending)
        self._failure: BaseException | None = None

    def submit(self, job: Callable[[], object]) -> None:
        """Queue a job; block while `pending` jobs are unfinished.

        Raises:
            BaseException: The error of an earlier job.
            RuntimeError: If the block has ended.
        """
        self._slots.acquire()
        if self._failure is not None:
            self._slots.release()
            raise self._failure
        try:
            future = self._executor.submit(self._run, job)
        except RuntimeError:
            self._slots.release()
            raise
        # Also called for cancelled jobs, so that no thread waits for a slot for ever.
        future.add_done_callback(lambda _: self._slots.release())

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
