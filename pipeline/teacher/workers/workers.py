"""Runs the segments of a capture in worker processes, any of which may die at any moment.

A worker loads the teacher once, computes segments and stages their shards; it never touches what
readers see. This process alone holds the store's lock, and it publishes what comes back. A segment
on which a worker died is run again; one that takes three workers with it ends the capture. Workers
are this process's own, or those of a cluster that runs already.
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
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.store.records import Receipt
from pipeline.teacher.capture.segments import SegmentJob
from pipeline.teacher.workers.cluster import local_workers, uninterrupted
from pipeline.teacher.workers.devices import visible_devices, worker_count
from pipeline.teacher.workers.remote import demands, running_cluster
from pipeline.teacher.workers.schedule import Runtime
from pipeline.teacher.workers.worker import DEATHS, DeadlySegmentError, TeacherPlugin, marks

logger = logging.getLogger(__name__)
WINDOW = 2
"""Segments a worker is given at once: one to run, one to go on with."""
PUBLISHERS = 8
"""Threads that publish what is staged: a file system syncs many files together in little more time
than one, and nothing else limits how many workers one capture can serve."""
LOOK_SECONDS = 2.0
"""How often workers are counted that join or leave while none finishes a segment."""
NO_WORKER_SECONDS = 120.0
"""After so long without any worker a capture ends."""
FAREWELL_SECONDS = 30.0
"""So long a cluster is asked to forget a capture."""


def _task(plugin: str) -> Callable[[int, tuple[str, ...]], dict[str, Receipt]]:
    """Return what workers run; it is pickled by value, and names nothing of this package.

    So a scheduler that somebody else runs needs nothing but Dask.
    """
    return lambda number, signals: get_worker().plugins[plugin].run(number, signals)  # pyright: ignore[reportAttributeAccessIssue]


def run_in_workers(
    job: SegmentJob,
    load: Callable[[], PreTrainedModel],
    todo: Mapping[int, tuple[str, ...]],
    runtime: Runtime,
) -> None:
    """Capture segments in worker processes and publish what they stage.

    For the holder of the store's lock, after all of `staging/` was removed: a worker that some
    earlier attempt left behind has no directory to write to.

    Args:
        job: What to capture, and how.
        load: Loads the teacher in a worker; it is pickled.
        todo: The missing signals of each segment.
        runtime: How many workers of this machine, or where those of a cluster are.

    Raises:
        ConfigError: If a worker does not see the store, or lacks the device.
        IncompatibleError: If a worker has another version.
        IntegrityError: If features are not finite and the policy is `stop`.
        ResourceError: If three workers died on one segment, no worker comes up, the cluster is
            gone, or the file system refuses; segments with receipts stay valid.
    """
    # What this process no longer needs, the workers do.
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
    """Give every worker, also one that comes later, what it needs; return the plugin's name."""
    directory = job.layout.attempt(attempt)
    payload = dumps((job, load))
    # Two captures may share a cluster, each with a store of its own; of one store there is one.
    name = f"decant-{job.layout.root.name}"
    if runtime.is_cluster:
        wanted = demands(directory, runtime.device)
        plugin = TeacherPlugin(name, payload, attempt, directory, runtime.threads, demands=wanted)
        with running_cluster(runtime.scheduler, runtime.tls) as client:
            try:
                try:
                    client.register_plugin(plugin)
                except (ImportError, AttributeError) as error:
                    raise IncompatibleError(
                        f"scheduler {runtime.scheduler}: a worker cannot run this software "
                        f"({error}); install on every machine what is installed here"
                    ) from error
                yield client, name
            finally:
                with uninterrupted(), suppress(Exception):
                    # The workers are asked by the scheduler; a hung one must not hang this process.
                    scheduler: Any = client.scheduler
                    client.sync(
                        scheduler.unregister_worker_plugin,
                        name=name,
                        callback_timeout=FAREWELL_SECONDS,
                    )
        return
    # A teacher that is spread over GPUs needs all of them.
    devices = visible_devices(runtime.device) if runtime.placement is None else ()
    workers = worker_count(runtime.workers, runtime.device, devices)
    threads = max(1, torch.get_num_threads() // workers)
    with local_workers(
        min(workers, segments),
        runtime.worker_megabytes,
        directory,
        preload=TeacherPlugin.__module__,
        dashboard=runtime.dashboard,
    ) as client:
        client.register_plugin(
            TeacherPlugin(name, payload, attempt, directory, threads, devices=devices)
        )
        yield client, name


class _Segments:
    """Segments on their way through the workers of a client, so many at once and no more."""

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
            DecantError: What a worker raised.
            ResourceError: If a segment takes `DEATHS` workers with it, none comes up, or the
                cluster is gone.
        """
        waiting, running = deque(sorted(todo)), self._running
        while waiting or running:
            window = WINDOW * self._count_workers()
            while waiting and len(running) < window:
                number = waiting.popleft()
                future = self._client.submit(self._task, number, todo[number], pure=False)
                running[future] = number
            for future in self._ended():
                number = running.pop(future)
                try:
                    receipts = future.result()
                except (KilledWorker, MemoryError, DeadlySegmentError):
                    self._count_deaths(number)
                    self._refuse_deadly(number)
                    waiting.appendleft(number)
                except NoWorkerError as error:
                    raise self._no_worker() from error
                except FutureCancelledError as error:
                    raise self._gone() from error
                else:
                    self._count_deaths(number)
                    yield receipts

    def end(self, *_: object) -> None:
        """Take back what still runs or waits in a cluster that goes on."""
        if self._running:
            with uninterrupted(), suppress(Exception):
                self._client.cancel(list(self._running), force=True)
        self._running.clear()

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
            raise self._gone() from error
        return list(ended.done)

    def _count_workers(self) -> int:
        """Return how many workers there are; none only while there is hope."""
        count = len(self._client.scheduler_info()["workers"])
        if count:
            self._seen = time.monotonic()
        elif time.monotonic() - self._seen > NO_WORKER_SECONDS:
            raise self._no_worker()
        return count

    def _no_worker(self) -> ResourceError:
        return ResourceError(
            f"scheduler {self._scheduler}: no worker for {NO_WORKER_SECONDS:.0f} s, expected at "
            "least one; look for what ended them (memory, processes, time limits), or use "
            "scheduler: synchronous, then run the same command again"
        )

    def _gone(self) -> ResourceError:
        return ResourceError(
            f"scheduler {self._scheduler}: is gone, or somebody cancelled the tasks of this "
            "capture; see that it runs, then run the same command again: what is finished is kept"
        )

    def _count_deaths(self, number: int) -> None:
        """Hold a death against the segment that ran, not against one that waited.

        A cluster runs a segment again by itself, so a death may come to light with its success.
        """
        count = len(list(self._marks.glob(f"{number}-*")))
        for death in range(self._deaths[number] + 1, count + 1):
            if death < DEATHS:
                logger.warning(
                    "a worker died on segment %d (%d of %d); it is run again",
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
            "what is finished is kept"
        )
