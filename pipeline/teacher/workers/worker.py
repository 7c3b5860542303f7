"""The Dask plugin of a worker process: it holds one teacher, and captures and stages segments.

Dask installs it on every worker, also on replacements and late joiners. Its payload is unpickled
only after the worker has passed its checks.
"""

import gc
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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

from pipeline.errors import DecantError, ResourceError, is_out_of_memory
from pipeline.store.records import Receipt
from pipeline.teacher.capture.segments import SegmentCapture, SegmentJob
from pipeline.teacher.workers.devices import writer_count
from pipeline.teacher.workers.remote import Requirements, refusal

DEATHS = 3
"""Number of worker deaths on one segment that end the capture."""


class DeadlySegmentError(Exception):
    """`DEATHS` workers died on a segment, so this worker does not run it."""


class TeacherPlugin(WorkerPlugin):
    """Holds the job, and the teacher from the first segment on.

    Args:
        name: The plugin's name, the same for all captures of a store, so that a new capture
            replaces a killed one.
        payload: The pickled job and function that loads its teacher.
        attempt: Name of the attempt whose staging directory shards are written to.
        directory: That directory.
        threads: Torch threads; 0 for what the worker was started with.
        writers: Threads that compress and write the signals of a segment, see `writer_count`.
        devices: The GPUs to distribute over workers, one each.
        requirements: Checks for a worker of a running cluster.
    """

    def __init__(
        self,
        name: str,
        payload: bytes,
        attempt: str,
        directory: Path,
        threads: int,
        writers: int = 0,
        *,
        devices: tuple[str, ...] = (),
        requirements: Requirements | None = None,
    ) -> None:
        self.name = name
        self._payload = payload
        self._attempt = attempt
        self._directory = directory
        self._threads = threads
        self._writers = writers
        self._devices = devices
        self._requirements = requirements

    def setup(self, worker: Worker) -> None:
        """Check and prepare a new worker; a failed check is raised with its first segment."""
        self._address = worker.address
        self._is_over = threading.Event()
        # A worker with several threads computes one segment at a time; others may write meanwhile.
        self._turn = threading.Lock()
        self._loaded: tuple[SegmentJob, SegmentCapture] | None = None
        self._refusal: DecantError | None = None
        self._threads_before = torch.get_num_threads()
        if self._requirements is None:
            transformers_logging.disable_progress_bar()
            transformers_logging.set_verbosity_error()
        else:
            self._refusal = refusal(self._requirements, worker.address)
        if self._devices:
            # Early enough, because the fork server has not initialised CUDA.
            device = self._devices[int(worker.name) % len(self._devices)]
            os.environ["CUDA_VISIBLE_DEVICES"] = device
        if self._threads:
            torch.set_num_threads(self._threads)

    def teardown(self, worker: Worker) -> None:
        """Free the worker; a running segment stops before its next batch."""
        self._is_over.set()
        torch.set_num_threads(self._threads_before)
        self._forget()

    def run(self, number: int, signals: tuple[str, ...]) -> dict[str, Receipt]:
        """Capture and stage signals of a segment.

        Raises:
            ConfigError: If this worker does not see the store or the teacher.
            DeadlySegmentError: If `DEATHS` workers died on it.
            IncompatibleError: If this worker has another version.
            IntegrityError: If features are not finite and the policy is `stop`.
            MemoryError: If memory runs out.
            ResourceError: If the attempt is over, or the file system refuses.
        """
        if self._refusal is not None:
            raise self._refusal
        try:
            with self._turn:
                self._raise_if_over()
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

        def stage(name: str) -> Receipt:
            return job.writers[name].stage_segment(
                number,
                captured.buffers[name],
                rows=captured.rows,
                skipped=captured.skipped[name],
                attempt=self._attempt,
            )

        # Signals in parallel: compression releases the interpreter.
        with ThreadPoolExecutor(writer_count(self._writers, job.device)) as pool:
            receipts = dict(zip(captured.buffers, pool.map(stage, captured.buffers), strict=True))
        mark.unlink(missing_ok=True)
        return receipts

    def _begin(self, number: int) -> Path:
        """Create a file that marks the segment as started and not finished by a worker."""
        directory = marks(self._directory)
        if len(list(directory.glob(f"{number}-*"))) >= DEATHS:
            raise DeadlySegmentError(number)
        mark = directory / f"{number}-{uuid4().hex}"
        # If the attempt is over, staging will raise.
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
                if self._requirements is None:
                    raise
                raise type(error)(f"worker {self._address}: {error}") from error
            base: Any = model.base_model
            base.register_forward_pre_hook(self._before_a_batch)
            self._loaded = job, SegmentCapture(job, model)
        return self._loaded

    def _before_a_batch(self, _: nn.Module, __: tuple[Any, ...]) -> None:
        self._raise_if_over()

    def _raise_if_over(self) -> None:
        if self._is_over.is_set():
            raise ResourceError(f"{self._directory}: this capture is over; start it again")

    def _forget(self) -> None:
        """Drop the teacher; a thread that still uses it calls this again."""
        self._loaded = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def marks(directory: Path) -> Path:
    """Return the directory with an attempt's marks of started and unfinished segments."""
    return directory / "begun"
