"""Runs the segments of a capture in worker processes, any of which may die at any moment.

A worker loads the teacher once, computes segments and stages their shards; it never touches what
readers see. This process alone holds the store's lock, and it publishes what comes back. A segment
on which a worker died is run again; one that takes three workers with it ends the capture.
"""

import gc
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from distributed import Client, Future, KilledWorker, Worker, get_worker, wait
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.scheduler import NoWorkerError
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from pipeline.errors import ResourceError
from pipeline.store.reader import StoreReader
from pipeline.store.records import Receipt
from pipeline.teacher.cluster import local_workers
from pipeline.teacher.schedule import Runtime
from pipeline.teacher.segments import SegmentCapture, SegmentJob

logger = logging.getLogger(__name__)
DEATHS = 3
"""So many workers may a segment take with it until the capture ends."""
WINDOW = 2
"""Segments a worker is given at once: one to run, one to go on with."""
PLUGIN = "decant-teacher"
OUT_OF_MEMORY = ("allocate memory", "not enough memory")
"""How torch says on a CPU that memory is not to be had, by a plain RuntimeError."""


class _TeacherPlugin(WorkerPlugin):
    """What a worker process has beside Dask: the job, and the teacher from its first segment on."""

    name = PLUGIN

    def __init__(
        self, job: SegmentJob, load: Callable[[], PreTrainedModel], attempt: str, threads: int
    ) -> None:
        self._job = job
        self._load = load
        self._attempt = attempt
        self._threads = threads

    def setup(self, worker: Worker) -> None:
        """Prepare a new worker, also one that replaces a dead one."""
        torch.set_num_threads(self._threads)
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()

    @cached_property
    def _capture(self) -> SegmentCapture:
        return SegmentCapture(self._job, self._load())

    def run(self, number: int, signals: tuple[str, ...]) -> dict[str, Receipt]:
        """Capture and stage signals of a segment.

        Raises:
            IntegrityError: If features are not finite and the policy is `stop`.
            MemoryError: If memory is not to be had.
            ResourceError: If the attempt is over, or the file system refuses.
        """
        # Should the attempt be over, staging will say so.
        with suppress(FileNotFoundError):
            _mark(self._job, self._attempt, number).touch()
        try:
            captured = self._capture(number, signals)
        except RuntimeError as error:
            if _is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise
        receipts = {
            name: self._job.writers[name].stage_segment(
                number,
                parts,
                rows=captured.rows,
                skipped=captured.skipped[name],
                attempt=self._attempt,
            )
            for name, parts in captured.buffers.items()
        }
        _mark(self._job, self._attempt, number).unlink(missing_ok=True)
        return receipts


def _run_segment(number: int, signals: tuple[str, ...]) -> dict[str, Receipt]:
    plugin: Any = get_worker().plugins[PLUGIN]
    return plugin.run(number, signals)


def _mark(job: SegmentJob, attempt: str, number: int) -> Path:
    """Return the file that says that a worker has begun a segment and not finished it."""
    return job.layout.attempt(attempt) / f"begun-{number}"


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or any(
        words in str(error) for words in OUT_OF_MEMORY
    )


def run_in_workers(
    job: SegmentJob,
    load: Callable[[], PreTrainedModel],
    todo: Mapping[int, tuple[str, ...]],
    runtime: Runtime,
) -> None:
    """Capture segments in worker processes of this machine and publish what they stage.

    For the holder of the store's lock, after all of `staging/` was removed: a worker that some
    earlier attempt left behind has no directory to write to.

    Args:
        job: What to capture, and how.
        load: Loads the teacher in a worker; it is pickled.
        todo: The missing signals of each segment.
        runtime: How many workers, and when one is ended for its memory.

    Raises:
        IntegrityError: If features are not finite and the policy is `stop`.
        ResourceError: If three workers died on one segment, no worker comes up, or the file system
            refuses; segments with receipts stay valid.
    """
    # What this process no longer needs, the workers do.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    attempt = uuid4().hex
    directory = job.layout.attempt(attempt)
    directory.mkdir(parents=True)
    workers = min(runtime.workers, os.cpu_count() or 1)
    threads = max(1, torch.get_num_threads() // workers)
    count = min(workers, len(todo))
    with (
        local_workers(count, runtime.worker_megabytes, directory, preload=__name__) as client,
        logging_redirect_tqdm(),
        tqdm(total=len(todo), desc="capture", unit="segment") as bar,
    ):
        client.register_plugin(_TeacherPlugin(job, load, attempt, threads))
        for receipts in _Segments(client, job, attempt, WINDOW * workers).results(todo):
            for name, receipt in receipts.items():
                job.writers[name].publish_segment(receipt, attempt=attempt)
            bar.update()


class _Segments:
    """Segments on their way through the workers of a client, so many at once and no more."""

    def __init__(self, client: Client, job: SegmentJob, attempt: str, window: int) -> None:
        self._client = client
        self._job = job
        self._attempt = attempt
        self._window = window
        self._deaths: Counter[int] = Counter()

    def results(self, todo: Mapping[int, tuple[str, ...]]) -> Iterator[dict[str, Receipt]]:
        """Yield each segment's receipts as it is staged, in any order.

        Raises:
            DecantError: What a worker raised.
            ResourceError: If a segment takes `DEATHS` workers with it, or none comes up.
        """
        waiting = deque(sorted(todo))
        running: dict[Future, int] = {}
        while waiting or running:
            while waiting and len(running) < self._window:
                number = waiting.popleft()
                future = self._client.submit(_run_segment, number, todo[number], pure=False)
                running[future] = number
            ended: Any = wait(list(running), return_when="FIRST_COMPLETED")
            for future in ended.done:
                number = running.pop(future)
                try:
                    yield future.result()
                except (KilledWorker, MemoryError):
                    self._count_death(number)
                    waiting.appendleft(number)
                except NoWorkerError as error:
                    raise ResourceError(
                        f"segment {number}: no worker process came up for it; look for memory and "
                        "processes that this machine lacks, or use scheduler: synchronous"
                    ) from error

    def _count_death(self, number: int) -> None:
        """Hold a death against the segment that ran, not against one that waited."""
        try:
            _mark(self._job, self._attempt, number).unlink()
        except FileNotFoundError:
            return
        self._deaths[number] += 1
        count = self._deaths[number]
        if count < DEATHS:
            logger.warning(
                "a worker died on segment %d (%d of %d); it is run again", number, count, DEATHS
            )
            return
        reader = StoreReader(self._job.layout.root)
        rows = reader.examples["row"][reader.examples_in(number)].tolist()
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        raise ResourceError(
            f"segment {number}: {count} workers died on it (killed, out of memory, or a crash of "
            f"the teacher), expected none; look at rows {', '.join(map(str, rows[:8]))}{more} of "
            f"split {reader.plan['segments'][number]}, lower batch_tokens or use fewer workers: "
            "what is finished is kept"
        )
