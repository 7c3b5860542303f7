"""One segment: all its missing signals in one pass of the teacher, encoded on its device."""

import logging
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.errors import IntegrityError
from pipeline.store.background import BackgroundWriter
from pipeline.store.commit import SignalWriter
from pipeline.store.extent import first_rows
from pipeline.store.forms.form import Channels, Form
from pipeline.store.planner import rows_digest
from pipeline.store.reader import StoreReader
from pipeline.teacher.forward import TappedTeacher, place_of, segment_batches

logger = logging.getLogger(__name__)
LARGEST = 3e38
"""Just below the largest bfloat16; beyond it rounding would give an infinity."""


class SegmentCapture:
    """Captures segments with one loaded teacher and hands them to the background writer."""

    def __init__(
        self,
        teacher: TappedTeacher,
        reader: StoreReader,
        writers: Mapping[str, SignalWriter],
        channels: Mapping[str, Channels | None],
        *,
        batch_tokens: int,
        pad_id: int,
        device: torch.device,
        nonfinite: Literal["stop", "skip"],
        background: BackgroundWriter,
    ) -> None:
        self._teacher = teacher
        self._reader = reader
        self._writers = writers
        self._forms: dict[str, Form] = {
            name: writer.declared.build_form() for name, writer in writers.items()
        }
        self._channels = channels
        self._batch_tokens = batch_tokens
        self._pad_id = pad_id
        self._device = device
        self._nonfinite = nonfinite
        self._background = background

    def __call__(self, number: int, signals: tuple[str, ...]) -> int:
        """Capture `signals` of one segment; return its tokens. Durable when the writer is done.

        Raises:
            IntegrityError: If a feature is not finite and the policy is `stop`.
        """
        segment = self._reader.read_segment(number)
        buffers = {name: self._writers[name].buffers() for name in signals}
        skipped: dict[str, set[int]] = {name: set() for name in signals}
        for batch in segment_batches(segment, self._batch_tokens, self._pad_id, self._device):
            values = self._teacher(batch)
            slots = segment.slot[batch.members]
            for name in signals:
                declared = self._writers[name].declared
                rows, owners = self._places(name, number, slots)
                bad = self._encode(
                    name,
                    values[place_of(declared.kind, declared.form, declared.layer)],
                    buffers[name],
                    rows,
                    owners,
                )
                if len(bad):
                    self._refuse(name, number, [int(slots[i]) for i in bad])
                    skipped[name].update(int(slots[i]) for i in bad)
        rows = rows_digest(self._reader.examples["digest"][self._reader.examples_in(number)])
        self._background.submit(lambda: self._commit(number, buffers, rows, skipped))
        return int(segment.length.sum())

    def _places(
        self, name: str, number: int, slots: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return, for each row of a batch's values, its row in the segment and its owner.

        The owner is the position in the batch of the example that the row belongs to.
        """
        counts = self._writers[name].example_rows(number)
        first, counts = first_rows(counts)[slots], counts[slots]
        owners = np.repeat(np.arange(len(slots)), counts)
        within = np.arange(len(owners)) - first_rows(counts)[owners]
        return first[owners] + within, owners

    def _encode(
        self,
        name: str,
        values: Mapping[str, Tensor],
        buffers: dict[str, NDArray[Any]],
        rows: NDArray[np.int64],
        owners: NDArray[np.int64],
    ) -> NDArray[np.int64]:
        """Encode a batch into its rows of the buffers; return the examples that were not finite."""
        encoded = self._forms[name].encode(values, self._channels[name])
        finite = torch.ones(len(rows), dtype=torch.bool, device=self._device)
        # NaN compares false, so one comparison finds it and both infinities.
        tests = [value.abs() <= LARGEST for value in values.values()]
        # Finite values may still leave the range of the form, as 65,504 in float16.
        tests += [value.isfinite() for value in encoded.values() if value.is_floating_point()]
        for test in tests:
            finite &= test.reshape(len(rows), -1).all(-1)
        bad = np.unique(owners[~finite.cpu().numpy()])
        keep = ~np.isin(owners, bad)
        for part, value in encoded.items():
            buffers[part][rows[keep]] = value.cpu().numpy()[keep]
        return bad

    def _refuse(self, name: str, number: int, slots: list[int]) -> None:
        if self._nonfinite == "stop":
            raise IntegrityError(
                f"{name} segment {number}: values that are not finite in example slots {slots}; "
                f"check the "
                "teacher, choose a form of wider range, or set capture.nonfinite: skip"
            )
        logger.warning("%s segment %d: skipped slots %s, not finite", name, number, slots)

    def _commit(
        self,
        number: int,
        buffers: Mapping[str, Mapping[str, NDArray[Any]]],
        rows: str,
        skipped: Mapping[str, set[int]],
    ) -> None:
        for name, parts in buffers.items():
            self._writers[name].write_segment(
                number, parts, rows=rows, skipped=tuple(sorted(skipped[name]))
            )
