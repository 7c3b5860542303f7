"""Runs the segments of a capture in this process, by one of Dask's local schedulers."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import delayed
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.store.background import BackgroundWriter
from pipeline.teacher.capture.segments import CapturedSegment, SegmentCapture, SegmentJob
from pipeline.teacher.source.placement import Placement
from pipeline.teacher.workers.devices import WORKERS


@dataclass(frozen=True)
class Certificates:
    """Files in PEM by which the members of a cluster know each other; all three, or none."""

    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None


@dataclass(frozen=True)
class Runtime:
    """How, not what: none of this changes a stored value on the same hardware.

    `scheduler` is `synchronous`, `threads` or `processes`, or the address of a running cluster. Of
    the latter two this holds as far as torch computes the same with other threads: those of this
    process are divided among `processes`, and a cluster's workers have `threads`, or with 0 what
    they were started with. `workers` 0 takes a process a GPU. `worker_megabytes` is the memory at
    which a worker process is ended, 0 for no limit. `dashboard` is where that of `processes`
    listens; empty for nowhere.
    """

    device: str = "cpu"
    scheduler: str = "synchronous"
    workers: int = 1
    worker_megabytes: int = 0
    writers: int = 1
    threads: int = 0
    wait: bool = True
    placement: Placement | None = None
    tls: Certificates = Certificates()
    dashboard: str = ""

    @property
    def is_cluster(self) -> bool:
        """Tell whether the scheduler is one that runs already, somewhere."""
        return "://" in self.scheduler


def run_here(
    job: SegmentJob,
    model: PreTrainedModel,
    todo: Mapping[int, tuple[str, ...]],
    runtime: Runtime,
) -> None:
    """Capture segments with one teacher; compressing and writing goes on in the background.

    Args:
        job: What to capture, and how.
        model: The teacher.
        todo: The missing signals of each segment.
        runtime: Which scheduler, with how many threads.

    Raises:
        IntegrityError: If features are not finite and the policy is `stop`.
        ResourceError: If the file system refuses; segments with receipts stay valid.
    """
    capture = SegmentCapture(job, model)
    with BackgroundWriter(threads=runtime.writers) as background:

        def run(number: int, signals: tuple[str, ...]) -> None:
            captured = capture(number, signals)
            background.submit(lambda: _write(job, captured))

        tasks = [
            delayed(run, pure=False)(number, signals, dask_key_name=f"segment-{number}")
            for number, signals in sorted(todo.items())
        ]
        with _Progress(len(tasks)):
            compute(
                *tasks,
                scheduler=runtime.scheduler,
                num_workers=min(runtime.workers or WORKERS, os.cpu_count() or 1),
            )


def _write(job: SegmentJob, captured: CapturedSegment) -> None:
    for name, parts in captured.buffers.items():
        job.writers[name].write_segment(
            captured.number, parts, rows=captured.rows, skipped=captured.skipped[name]
        )


class _Progress(Callback):
    """A bar of segments with an ETA, on stderr, whatever the local scheduler."""

    def __init__(self, segments: int) -> None:
        super().__init__()
        self._bar = tqdm(total=segments, desc="capture", unit="segment")

    def _posttask(self, key, result, dsk, state, worker_id) -> None:  # noqa: ANN001
        if str(key).startswith("segment-"):
            self._bar.update()

    def _finish(self, dsk, state, failed) -> None:  # noqa: ANN001
        self._bar.close()
