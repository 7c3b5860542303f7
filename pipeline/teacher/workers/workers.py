"""Run a capture's segments in worker processes, any of which may die at any moment.

A worker loads the teacher once, computes segments and stages their shards, but never changes what
readers see. Only this process holds the store's lock and publishes staged shards. A segment on
which a worker died is run again; after three deaths on one segment the capture ends. Workers are
started by this process or belong to a running cluster.
"""

import gc
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from distributed import Client, Future, KilledWorker, get_worker, wait
from distributed.client import FutureCancelledError, FuturesCancelledError
from distributed.protocol.pickle import dumps
from distributed.scheduler import NoWorkerError
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError, ResourceError
from pipeline.runtime import Runtime
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.store.records import Receipt
from pipeline.teacher.capture.segments import SegmentJob
from pipeline.teacher.workers.cluster import local_workers, uninterrupted
from pipeline.teacher.workers.devices import visible_devices, worker_count
from pipeline.teacher.workers.remote import (
    needs_scheduler,
    requirements,
    running_cluster,
    scheduler_gone,
)
from pipeline.teacher.workers.worker import DEATHS, DeadlySegmentError, TeacherPlugin, marks

logger = logging.getLogger(__name__)
WINDOW = 2
"""Segments submitted per worker: one that runs and one that waits."""
PUBLISHERS = 8
"""Threads that publish staged shards. Syncing many files together takes little longer than one, and
publishing is all that limits the number of workers of a capture."""
LOOK_SECONDS = 2.0
"""Interval for counting workers while no segment finishes."""
NO_WORKER_SECONDS = 120.0
"""Time without any worker after which a capture ends."""
UNREGISTER_SECONDS = 30.0
"""Timeout for removing a capture from a cluster."""


def _task(plugin: str) -> Callable[[int, tuple[str, ...]], dict[str, Receipt]]:
    """Return the task for workers, pickled by value and without references to this package.

    A cluster's scheduler can therefore run without this package.
    """
    return lambda number, signals: get_worker().plugins[plugin].run(number, signals)  # pyright: ignore[reportAttributeAccessIssue]


def run_in_workers(
    job: SegmentJob,
    load: Callable[[], PreTrainedModel],
    todo: Mapping[int, tuple[str, ...]],
    runtime: Runtime,
) -> None:
    """Capture segments in worker processes and publish the shards they stage.

    The caller holds the store's lock and has removed `staging/`, so that workers of an earlier
    attempt have no directory to write to.

    Args:
        job: The signals to capture and where to write them.
        load: Loads the teacher in a worker; it is pickled.
        todo: The missing signals of each segment.
        runtime: The number of workers on this machine, or the address of a cluster.

    Raises:
        ConfigError: If a worker does not see the store, or lacks the device.
        IncompatibleError: If a worker has another version.
        IntegrityError: If features are not finite and the policy is `stop`.
        ResourceError: If three workers died on one segment, no worker starts, the cluster is gone,
            or the file system refuses; segments with receipts stay valid.
    """
    # Free memory for the workers.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    attempt = uuid4().hex
    marks(job.layout.attempt(attempt)).mkdir(parents=True)
    with (
        _workers(job, load, attempt, runtime, len(todo)) as (client, plugin),
        logging_redirect_tqdm(),
        tqdm(total=len(todo), desc="capture", unit="segment") as bar,
    ):
        segments = _Segments(client, _task(plugin), job.layout, attempt, runtime.scheduler)
        with ExitStack() as stack:
            if runtime.is_cluster:
                stack.push(segments.end)
            pool = stack.enter_context(ThreadPoolExecutor(PUBLISHERS))
            for receipts in segments.results(todo):
                list(pool.map(partial(_publish, job, attempt), receipts.items()))
                bar.update()


def _publish(job: SegmentJob, attempt: str, staged: tuple[str, Receipt]) -> None:
    name, receipt = staged
    job.writers[name].publish_segment(receipt, attempt=attempt)


@contextmanager
def _workers(
    job: SegmentJob,
    load: Callable[[], PreTrainedModel],
    attempt: str,
    runtime: Runtime,
    segments: int,
) -> Iterator[tuple[Client, str]]:
    """Provide workers, including later ones, with the plugin; yield the client and its name."""
    directory = job.layout.attempt(attempt)
    payload = dumps((job, load))
    # Captures of different stores may share a cluster; a store has only one capture at a time.
    name = f"decant-{job.layout.root.name}"
    if runtime.is_cluster:
        required = requirements(directory, runtime.torch_device())
        plugin = TeacherPlugin(
            *(name, payload, attempt, directory, runtime.threads, runtime.writers),
            requirements=required,
        )
        with running_cluster(runtime) as client:
            try:
                try:
                    with needs_scheduler(runtime.scheduler):
                        client.register_plugin(plugin)
                except (ImportError, AttributeError) as error:
                    raise IncompatibleError(
                        f"scheduler {runtime.scheduler}: a worker cannot run this software "
                        f"({error}); install on every machine what is installed here"
                    ) from error
                yield client, name
            finally:
                with uninterrupted(), suppress(Exception):
                    # With a timeout, so that a hung worker does not block this process.
                    scheduler: Any = client.scheduler
                    client.sync(
                        scheduler.unregister_worker_plugin,
                        name=name,
                        callback_timeout=UNREGISTER_SECONDS,
                    )
        return
    # A teacher that is spread over GPUs uses all of them.
    device = runtime.torch_device()
    devices = visible_devices(device) if runtime.device_map is None else ()
    workers = worker_count(runtime.workers, device, devices)
    threads = max(1, torch.get_num_threads() // workers)
    with local_workers(
        min(workers, segments),
        runtime.worker_megabytes,
        directory,
        preload=TeacherPlugin.__module__,
        dashboard=runtime.dashboard_address,
    ) as client:
        client.register_plugin(
            TeacherPlugin(
                *(name, payload, attempt, directory, threads, runtime.writers), devices=devices
            )
        )
        yield client, name


class _Segments:
    """Submits segments to a client's workers, a limited number at a time."""

    def __init__(
        self,
        client: Client,
        task: Callable[[int, tuple[str, ...]], dict[str, Receipt]],
        layout: Layout,
        attempt: str,
        scheduler: str,
    ) -> None:
        self._client = client
        self._task = task
        self._layout = layout
        self._marks = marks(layout.attempt(attempt))
        self._scheduler = scheduler
        self._deaths: Counter[int] = Counter()
        self._running: dict[Future, int] = {}
        self._seen = time.monotonic()

    def results(self, todo: Mapping[int, tuple[str, ...]]) -> Iterator[dict[str, Receipt]]:
        """Yield each segment's receipts as it is staged, in any order.

        Raises:
            DecantError: An error that a worker raised.
            ResourceError: If `DEATHS` workers died on a segment, no worker starts, or the cluster
                is gone.
        """
        waiting, running = deque(sorted(todo)), self._running
        while waiting or running:
            window = WINDOW * self._count_workers()
            while waiting and len(running) < window:
                number = waiting.popleft()
                with needs_scheduler(self._scheduler):
                    future = self._client.submit(self._task, number, todo[number], pure=False)
                running[future] = number
            for future in self._ended():
                number = running.pop(future)
                try:
                    receipts = self._receipts(future)
                except (KilledWorker, MemoryError, DeadlySegmentError):
                    self._count_deaths(number)
                    self._refuse_deadly(number)
                    waiting.appendleft(number)
                except NoWorkerError as error:
                    raise self._no_worker() from error
                except FutureCancelledError as error:
                    raise scheduler_gone(self._scheduler) from error
                else:
                    self._count_deaths(number)
                    yield receipts

    def end(self, *_: object) -> None:
        """Cancel all running and waiting tasks in a cluster that keeps running."""
        if self._running:
            with uninterrupted(), suppress(Exception):
                self._client.cancel(list(self._running), force=True)
        self._running.clear()

    def _receipts(self, future: Future) -> dict[str, Receipt]:
        """Return what a task returned, or raise what it raised."""
        if future.status == "error":
            # An OSError of the task itself says nothing about the scheduler.
            return future.result()
        with needs_scheduler(self._scheduler):
            return future.result()

    def _ended(self) -> list[Future]:
        if not self._running:
            time.sleep(LOOK_SECONDS / 10)
            return []
        try:
            ended: Any = wait(
                list(self._running), timeout=LOOK_SECONDS, return_when="FIRST_COMPLETED"
            )
        except TimeoutError:
            return []
        except FuturesCancelledError as error:
            raise scheduler_gone(self._scheduler) from error
        return list(ended.done)

    def _count_workers(self) -> int:
        """Return the number of workers; raise if there were none for `NO_WORKER_SECONDS`."""
        count = len(self._client.scheduler_info()["workers"])
        if count:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > NO_WORKER_SECONDS:
            raise self._no_worker()
        return count

    def _no_worker(self) -> ResourceError:
        return ResourceError(
            f"scheduler {self._scheduler}: no worker for {NO_WORKER_SECONDS:.0f} s, expected at "
            "least one; find out what ended them (memory, processes, time limits), or use "
            "scheduler: synchronous, then run the same command again"
        )

    def _count_deaths(self, number: int) -> None:
        """Count deaths for the segment that was running, not for one that was waiting.

        A cluster repeats a segment by itself, so a death may be noticed only when it succeeds.
        """
        count = len(list(self._marks.glob(f"{number}-*")))
        for death in range(self._deaths[number] + 1, count + 1):
            if death < DEATHS:
                logger.warning(
                    "a worker died on segment %d (%d of %d); running it again",
                    *(number, death, DEATHS),
                )
        self._deaths[number] = count

    def _refuse_deadly(self, number: int) -> None:
        count = self._deaths[number]
        if count < DEATHS:
            return
        reader = StoreReader(self._layout.root)
        rows = reader.examples["row"][reader.examples_in(number)].tolist()
        more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
        raise ResourceError(
            f"segment {number}: {count} workers died on it (killed, out of memory, or a crash of "
            f"the teacher), expected none; look at rows {', '.join(map(str, rows[:8]))}{more} of "
            f"split {reader.plan['segments'][number]}, lower batch_tokens or use fewer workers: "
            "finished segments are kept"
        )
