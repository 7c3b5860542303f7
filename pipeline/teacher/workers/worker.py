"""What a worker process has beside Dask: one teacher, that captures and stages segments.

It is Dask's plugin, so a worker that replaces a dead one or joins late has it too. What it gets is
read only after the worker has shown that it can take part.
"""

import gc
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from distributed import Worker
from distributed.diagnostics.plugin import WorkerPlugin
from distributed.protocol.pickle import loads
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from pipeline.errors import DecantError, ResourceError
from pipeline.store.records import Receipt
from pipeline.teacher.capture.segments import SegmentCapture, SegmentJob
from pipeline.teacher.workers.remote import Demands, refusal
from pipeline.training.memory import is_out_of_memory

DEATHS = 3
"""So many workers may a segment take with it until the capture ends."""


class DeadlySegmentError(Exception):
    """A segment took `DEATHS` workers with it; this one is spared."""


class TeacherPlugin(WorkerPlugin):
    """The job, and the teacher from the first segment on.

    Args:
        name: The same for every capture of a store, so that a new one takes the place of one that
            was killed.
        payload: The job and what loads its teacher, pickled.
        attempt: The attempt that shards are staged in.
        directory: Its directory.
        threads: Of torch; 0 leaves what the worker was started with.
        devices: The GPUs that the workers share out, one each, by their numbers.
        demands: What a worker must show that this process has not started itself.
    """

    def __init__(
        self,
        name: str,
        payload: bytes,
        attempt: str,
        directory: Path,
        threads: int,
        *,
        devices: tuple[str, ...] = (),
        demands: Demands | None = None,
    ) -> None:
        self.name = name
        self._payload = payload
        self._attempt = attempt
        self._directory = directory
        self._threads = threads
        self._devices = devices
        self._demands = demands

    def setup(self, worker: Worker) -> None:
        """Prepare a new worker; one that cannot take part says so when it is given a segment."""
        self._address = worker.address
        self._is_over = threading.Event()
        # A worker of several threads runs one segment at a time; the others may write theirs.
        self._turn = threading.Lock()
        self._loaded: tuple[SegmentJob, SegmentCapture] | None = None
        self._refusal: DecantError | None = None
        self._threads_before = torch.get_num_threads()
        if self._demands is None:
            transformers_logging.disable_progress_bar()
            transformers_logging.set_verbosity_error()
        else:
            self._refusal = refusal(self._demands, worker.address)
        if self._devices:
            # Early enough: the server that forked this process has not begun with CUDA.
            device = self._devices[int(worker.name) % len(self._devices)]
            os.environ["CUDA_VISIBLE_DEVICES"] = device
        if self._threads:
            torch.set_num_threads(self._threads)

    def teardown(self, worker: Worker) -> None:
        """Leave the worker to others; a segment that runs ends before its next batch."""
        self._is_over.set()
        torch.set_num_threads(self._threads_before)
        self._forget()

    def run(self, number: int, signals: tuple[str, ...]) -> dict[str, Receipt]:
        """Capture and stage signals of a segment.

        Raises:
            ConfigError: If this worker does not see the store or the teacher.
            DeadlySegmentError: If it took enough workers with it.
            IncompatibleError: If this worker has another version.
            IntegrityError: If features are not finite and the policy is `stop`.
            MemoryError: If memory is not to be had.
            ResourceError: If the attempt is over, or the file system refuses.
        """
        if self._refusal is not None:
            raise self._refusal
        try:
            with self._turn:
                self._refuse_what_is_over()
                mark = self._begin(number)
                job, capture = self._load()
                captured = capture(number, signals)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            raise
        finally:
            if self._is_over.is_set():
                self._forget()
        receipts = {
            name: job.writers[name].stage_segment(
                number,
                parts,
                rows=captured.rows,
                skipped=captured.skipped[name],
                attempt=self._attempt,
            )
            for name, parts in captured.buffers.items()
        }
        mark.unlink(missing_ok=True)
        return receipts

    def _begin(self, number: int) -> Path:
        """Leave a file that says that a worker has begun a segment and not finished it."""
        directory = marks(self._directory)
        if len(list(directory.glob(f"{number}-*"))) >= DEATHS:
            raise DeadlySegmentError(number)
        mark = directory / f"{number}-{uuid4().hex}"
        # Should the attempt be over, staging will say so.
        with suppress(FileNotFoundError):
            mark.touch()
        return mark

    def _load(self) -> tuple[SegmentJob, SegmentCapture]:
        if self._loaded is None:
            contents: tuple[SegmentJob, Callable[[], PreTrainedModel]] = loads(self._payload)
            job, load = contents
            try:
                model = load()
            except DecantError as error:
                if self._demands is None:
                    raise
                raise type(error)(f"worker {self._address}: {error}") from error
            base: Any = model.base_model
            base.register_forward_pre_hook(self._before_a_batch)
            self._loaded = job, SegmentCapture(job, model)
        return self._loaded

    def _before_a_batch(self, _: nn.Module, __: tuple[Any, ...]) -> None:
        self._refuse_what_is_over()

    def _refuse_what_is_over(self) -> None:
        if self._is_over.is_set():
            raise ResourceError(f"{self._directory}: this capture is over; start it again")

    def _forget(self) -> None:
        """Drop the teacher; a thread that still uses it calls this once more."""
        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def marks(directory: Path) -> Path:
    """Return where an attempt's workers say which segments they have begun and not finished."""
    return directory / "begun"
