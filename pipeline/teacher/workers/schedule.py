"""Run a capture's segments in this process with one of Dask's local schedulers."""

import os
import threading
from collections.abc import Callable, Mapping
from functools import partial

from dask.base import compute
from dask.callbacks import Callback
from dask.delayed import delayed
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.runtime import Runtime
from pipeline.store.background import BackgroundWriter
from pipeline.teacher.capture.segments import CapturedSegment, SegmentCapture, SegmentJob
from pipeline.teacher.workers.devices import WORKERS, writer_count


def run_here(
    job: SegmentJob,
    model: PreTrainedModel,
    todo: Mapping[int, tuple[str, ...]],
    runtime: Runtime,
) -> None:
    """Capture segments with one teacher, compressing and writing in the background.

    Args:
        job: The signals to capture and where to write them.
        model: The teacher.
        todo: The missing signals of each segment.
        runtime: The scheduler and its number of threads.

    Raises:
        IntegrityError: If features are not finite and the policy is `stop`.
        ResourceError: If the file system refuses; segments with receipts stay valid.
    """
    capture = SegmentCapture(job, model)
    launched: dict[int, Callable[[], CapturedSegment]] = {}
    with BackgroundWriter(threads=writer_count(runtime.writers, job.device)) as background:

        def end_launched(thread: int) -> None:
            end = launched.pop(thread, None)
            if end is not None:
                captured = end()
                background.submit(partial(_write, job, captured), captured.bytes)

        def run(number: int, signals: tuple[str, ...]) -> None:
            # A segment is ended when the first batch of the thread's next one is launched.
            thread = threading.get_ident()
            launched[thread] = capture.launch(number, signals, partial(end_launched, thread))

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
            for thread in list(launched):
                end_launched(thread)


def _write(job: SegmentJob, captured: CapturedSegment) -> None:
    for name, arrays in captured.buffers.items():
        job.writers[name].write_segment(
            captured.number, arrays, rows=captured.rows, skipped=captured.skipped[name]
        )


class _Progress(Callback):
    """A progress bar of segments on stderr, for any local scheduler."""

    def __init__(self, segments: int) -> None:
        super().__init__()
        self._bar = tqdm(total=segments, desc="capture", unit="segment")

    def _posttask(self, key, result, dsk, state, worker_id) -> None:  # noqa: ANN001
        if str(key).startswith("segment-"):
            self._bar.update()

    def _finish(self, dsk, state, failed) -> None:  # noqa: ANN001
        self._bar.close()
