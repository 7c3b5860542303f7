"""Encodes a batch: the stored arrays of every signal, before compression, still on the device.

Touches no store, so that whoever asks what a batch costs in bytes, time or memory asks this.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.store.forms.form import Channels, Form
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport
from pipeline.teacher.capture.finite import LARGEST, first_beyond
from pipeline.teacher.capture.forward import Batch, Place, TappedTeacher, Values, place_of


@dataclass(frozen=True, eq=False)
class Encoded:
    """A signal's rows of a batch: its arrays by name, and whether each row may be stored."""

    arrays: dict[str, Tensor]
    finite: Bool[Tensor, " rows"]


class BatchEncoder:
    """Runs the teacher on a batch and encodes what its signals keep of it; threads may share it.

    Args:
        model: The teacher; its blocks may lie on several devices.
        report: What the check of its taps found.
        signals: What to encode; those without arrays are left out.
        channels: Each signal's channel statistics by its name, None where its form needs none.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        report: TapReport,
        signals: Sequence[Signal],
        channels: Mapping[str, Channels | None],
    ) -> None:
        self._teacher = TappedTeacher(model, report, signals)
        self._channels = dict(channels)
        self._moved: dict[tuple[str, torch.device], Channels] = {}
        self._signals: dict[Place, list[Signal]] = {}
        for signal in signals:
            self._signals.setdefault(place_of(signal), []).append(signal)

    @torch.inference_mode()
    def __call__(self, batch: Batch, names: Collection[str] | None = None) -> dict[str, Encoded]:
        """Return the rows of a batch, in its order, by signal.

        Args:
            batch: The batch.
            names: The signals wanted, by default all; the teacher runs the same for fewer.
        """
        found: dict[str, Encoded] = {}
        for place, values in self._teacher.values(batch):
            signals = [
                signal
                for signal in self._signals.get(place, ())
                if names is None or signal.name in names
            ]
            if signals:
                found |= self._encode(place, values, signals)
        return found

    def _encode(
        self, place: Place, values: Values, signals: Sequence[Signal]
    ) -> dict[str, Encoded]:
        pieces: dict[str, list[Encoded]] = {signal.name: [] for signal in signals}
        for piece in self._teacher.pieces(place, values):
            device = next(iter(piece.values())).device
            for signal in signals:
                channels = self._on(signal.name, device)
                pieces[signal.name].append(encode_rows(signal.form, piece, channels))
        return {name: _joined(encoded) for name, encoded in pieces.items()}

    def _on(self, name: str, device: torch.device) -> Channels | None:
        """Return a signal's channel statistics where its values are."""
        channels = self._channels.get(name)
        if channels is None:
            return None
        key = name, device
        if key not in self._moved:
            self._moved[key] = Channels(channels.mean.to(device), channels.deviation.to(device))
        return self._moved[key]

    def first_beyond(self, batch: Batch, name: str, rows: NDArray[np.bool_]) -> str:
        """Run the teacher again and return, in words, the first value that cannot be stored.

        Args:
            batch: The batch.
            name: The signal.
            rows: Among which of its rows of the batch.
        """
        for place, values in self._teacher.values(batch):
            if name not in {signal.name for signal in self._signals.get(place, ())}:
                continue
            chosen: dict[str, list[Tensor]] = {}
            first = 0
            for piece in self._teacher.pieces(place, values):
                count = len(next(iter(piece.values())))
                here = torch.from_numpy(rows[first : first + count])
                for key, value in piece.items():
                    chosen.setdefault(key, []).append(value[here.to(value.device)])
                first += count
            found = {key: torch.cat(pieces) for key, pieces in chosen.items()}
            return first_beyond(found)
        raise KeyError(name)


def encode_rows(form: Form, values: Values, channels: Channels | None) -> Encoded:
    """Encode float32 rows and tell which of them are finite, before and after.

    Finite values may still leave the range of their form, as 65,504 in float16.
    """
    arrays = form.encode(values, channels)
    tested = [array.float() for array in arrays.values() if array.is_floating_point()]
    if not form.shows_nonfinite:
        tested += values.values()
    finite = _is_finite(tested[0])
    for rows in tested[1:]:
        finite &= _is_finite(rows)
    return Encoded(arrays, finite)


def _is_finite(values: Tensor) -> Tensor:
    """Tell of each row whether all of it is; NaN compares false, and both reductions keep it."""
    if values.ndim == 1:
        return values.abs() <= LARGEST
    rows = values.flatten(1)
    return (rows.amax(-1) <= LARGEST) & (rows.amin(-1) >= -LARGEST)


def _joined(pieces: Sequence[Encoded]) -> Encoded:
    if len(pieces) == 1:
        return pieces[0]
    names = pieces[0].arrays
    arrays = {name: torch.cat([piece.arrays[name] for piece in pieces]) for name in names}
    return Encoded(arrays, torch.cat([piece.finite for piece in pieces]))
