"""Capture a segment: all its missing signals in one pass of the teacher, encoded on the device."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.axes import SPLITS
from pipeline.errors import IntegrityError
from pipeline.store.commit import SignalWriter
from pipeline.store.extent import first_rows
from pipeline.store.forms.form import Channels
from pipeline.store.layout import Layout
from pipeline.store.planner import rows_digest
from pipeline.store.reader import StoreReader
from pipeline.store.records import Declaration
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport
from pipeline.teacher.capture.encode import BatchEncoder, Encoded
from pipeline.teacher.capture.forward import Batch, segment_batches


class Arrivals:
    """Starts asynchronous copies of one thread's batches; each thread needs its own object."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def send(self, tensors: Mapping[str, Tensor]) -> "Arrival":
        """Start to copy; the caller may drop the tensors at once."""
        hosts: dict[str, Tensor] = {}
        used: set[torch.device] = set()
        for name, tensor in tensors.items():
            if tensor.device.type != "cuda":
                hosts[name] = tensor.cpu()
                continue
            hosts[name] = self._copy(tensor, is_ordered=tensor.device in used)
            used.add(tensor.device)
        events = [self._streams[device].record_event() for device in used]
        return Arrival(hosts, events)

    def _copy(self, tensor: Tensor, *, is_ordered: bool) -> Tensor:
        device = tensor.device
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        if not is_ordered:
            # Copies must wait for the encoding kernels; once per batch is enough.
            stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            host.copy_(tensor, non_blocking=True)
        # Keep the allocator from reusing its memory before it is copied.
        tensor.record_stream(stream)
        return host


class Arrival:
    """Tensors whose copy has started."""

    def __init__(self, hosts: Mapping[str, Tensor], events: Sequence[torch.Event]) -> None:
        self._hosts = hosts
        self._events = events

    def wait(self) -> dict[str, NDArray[Any]]:
        """Wait for the copies and return them as arrays."""
        for event in self._events:
            event.synchronize()
        return {name: host.numpy() for name, host in self._hosts.items()}


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SegmentJob:
    """Everything that a process needs to capture segments except the teacher; can be pickled.

    `writers` holds the writer of each signal to capture, by name; `signals` are the same signals.
    """

    layout: Layout
    writers: Mapping[str, SignalWriter]
    signals: Sequence[Signal]
    report: TapReport
    batch_tokens: int
    pad_id: int
    device: torch.device
    nonfinite: Literal["stop", "skip"]


@dataclass(frozen=True)
class CapturedSegment:
    """The encoded arrays of one segment and its skipped example slots, by signal."""

    number: int
    rows: str
    buffers: dict[str, dict[str, NDArray[Any]]]
    skipped: dict[str, tuple[int, ...]]

    @property
    def bytes(self) -> int:
        """The bytes of its arrays, before compression."""
        return sum(array.nbytes for arrays in self.buffers.values() for array in arrays.values())


class SegmentCapture:
    """Captures segments with one loaded teacher; threads may share it."""

    def __init__(self, job: SegmentJob, model: PreTrainedModel) -> None:
        channels = {name: _channels(job, writer.declared) for name, writer in job.writers.items()}
        self._encoder = BatchEncoder(model, job.report, job.signals, channels)
        self._reader = StoreReader(job.layout.root)
        self._writers = job.writers
        self._batch_tokens = job.batch_tokens
        self._pad_id = job.pad_id
        self._device = job.device
        self._nonfinite = job.nonfinite

    def __call__(self, number: int, signals: tuple[str, ...]) -> CapturedSegment:
        """Capture `signals` of one segment without writing anything.

        Raises:
            IntegrityError: If a feature is not finite and the policy is `stop`.
        """
        return self.launch(number, signals)()

    def launch(
        self,
        number: int,
        signals: tuple[str, ...],
        meanwhile: Callable[[], object] = lambda: None,
    ) -> Callable[[], CapturedSegment]:
        """Launch all batches of a segment; return a function that waits for the last and ends.

        So a GPU has work while the segment before is ended.

        Args:
            number: The segment.
            signals: Names of the signals.
            meanwhile: Called when the first batch is launched.

        Raises:
            IntegrityError: If a feature is not finite and the policy is `stop`.
        """
        segment = self._reader.read_segment(number)
        buffers = {name: self._writers[name].buffers() for name in signals}
        skipped: dict[str, set[int]] = {name: set() for name in signals}
        arrivals = Arrivals()

        def store(batch: Batch, arrival: Arrival) -> None:
            slots = segment.slot[batch.members]
            arrays = arrival.wait()
            for name in signals:
                rows, owners = self._rows_of(name, number, slots)
                bad = _store(name, arrays, buffers[name], rows, owners)
                if len(bad):
                    first = self._encoder.first_beyond(batch, name, owners == bad[0])
                    self._refuse(name, number, [int(slots[i]) for i in bad], first)
                    skipped[name].update(int(slots[i]) for i in bad)

        # One batch behind, so that the GPU has work while this process stores.
        then: Callable[[], object] = meanwhile
        for batch in segment_batches(segment, self._batch_tokens, self._pad_id, self._device):
            arrival = arrivals.send(_named(self._encoder(batch, signals)))
            then()
            then = partial(store, batch, arrival)

        def end() -> CapturedSegment:
            then()
            members = self._reader.examples_in(number)
            rows = rows_digest(self._reader.examples["digest"][members])
            done = {name: tuple(sorted(slots)) for name, slots in skipped.items()}
            return CapturedSegment(number, rows, buffers, done)

        return end

    def _rows_of(
        self, name: str, number: int, slots: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return, for each row of a batch's values, its row in the segment and its owner.

        The owner is the batch position of the example that the row belongs to.
        """
        counts = self._writers[name].example_rows(number)
        first, counts = first_rows(counts)[slots], counts[slots]
        owners = np.repeat(np.arange(len(slots)), counts)
        within = np.arange(len(owners)) - first_rows(counts)[owners]
        return first[owners] + within, owners

    def _refuse(self, name: str, number: int, slots: list[int], first: str) -> None:
        table = self._reader.examples
        members = self._reader.examples_in(number)
        example = members[table["slot"][members] == slots[0]][0]
        where = f"row {table['source_row'][example]} of {SPLITS[table['split'][example]]}"
        if self._nonfinite == "stop":
            raise IntegrityError(
                f"{name} segment {number}: values that are not finite in example slots {slots}, "
                f"the first {first}, in {where}; check the teacher, choose a form of wider range, "
                "or set capture.nonfinite: skip"
            )
        logger.warning(
            "%s segment %d: skipped slots %s, not finite (the first %s, in %s)",
            *(name, number, slots, first, where),
        )


def _named(encoded: Mapping[str, Encoded]) -> dict[str, Tensor]:
    """Return a batch's tensors by `signal/array`, and each signal's finite mask by its name."""
    tensors = {name: signal.finite for name, signal in encoded.items()}
    for name, signal in encoded.items():
        tensors |= {f"{name}/{array}": value for array, value in signal.arrays.items()}
    return tensors


def _store(
    name: str,
    arrays: Mapping[str, NDArray[Any]],
    buffers: dict[str, NDArray[Any]],
    rows: NDArray[np.int64],
    owners: NDArray[np.int64],
) -> NDArray[np.int64]:
    """Copy a batch into the buffers; return the examples left out because they are not finite."""
    finite = arrays[name]
    if finite.all():
        for array, buffer in buffers.items():
            buffer[rows] = arrays[f"{name}/{array}"]
        return np.empty(0, np.int64)
    bad = np.unique(owners[~finite])
    keep = ~np.isin(owners, bad)
    for array, buffer in buffers.items():
        buffer[rows[keep]] = arrays[f"{name}/{array}"][keep]
    return bad


def _channels(job: SegmentJob, declared: Declaration) -> Channels | None:
    if declared.channels is None:
        return None
    tensors = load_file(job.layout.channels(declared.kind, declared.layer))
    return Channels(tensors["mean"].to(job.device), tensors["deviation"].to(job.device))
