"""Encode a batch to the stored arrays of every signal, before compression, on the device.

Does not access a store, so estimates of a batch's bytes, time and memory use it too.
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
from pipeline.teacher.capture.forward import Batch, FeatureKey, TappedTeacher, Values, feature_key

LARGEST = 3e38
"""Just below the largest bfloat16, beyond which rounding would give an infinity."""


@dataclass(frozen=True, eq=False)
class Encoded:
    """A signal's rows of a batch: its arrays by name, and whether each row may be stored."""

    arrays: dict[str, Tensor]
    finite: Bool[Tensor, " rows"]


class BatchEncoder:
    """Runs the teacher on a batch and encodes the batch's signals; threads may share it.

    Args:
        model: The teacher; its blocks may be on several devices.
        report: The report of its tap check.
        signals: The signals to encode; those without arrays are left out.
        channels: Channel statistics by signal name, None if the form needs none.
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
        self._signals: dict[FeatureKey, list[Signal]] = {}
        for signal in signals:
            self._signals.setdefault(feature_key(signal), []).append(signal)

    @torch.inference_mode()
    def __call__(self, batch: Batch, names: Collection[str] | None = None) -> dict[str, Encoded]:
        """Return the encoded rows of a batch by signal, in the batch's order.

        Args:
            batch: The batch.
            names: The signals to return, by default all; the teacher's pass is the same for fewer.
        """
        encoded: dict[str, Encoded] = {}
        for feature, values in self._teacher.values(batch):
            signals = [
                signal
                for signal in self._signals.get(feature, ())
                if names is None or signal.name in names
            ]
            if signals:
                encoded |= self._encode(feature, values, signals)
        return encoded

    def _encode(
        self, feature: FeatureKey, values: Values, signals: Sequence[Signal]
    ) -> dict[str, Encoded]:
        pieces: dict[str, list[Encoded]] = {signal.name: [] for signal in signals}
        for piece in self._teacher.pieces(feature, values):
            device = next(iter(piece.values())).device
            for signal in signals:
                channels = self._on(signal.name, device)
                pieces[signal.name].append(encode_rows(signal.form, piece, channels))
        return {name: _joined(encoded) for name, encoded in pieces.items()}

    def _on(self, name: str, device: torch.device) -> Channels | None:
        """Return a signal's channel statistics on a device."""
        channels = self._channels.get(name)
        if channels is None:
            return None
        key = name, device
        if key not in self._moved:
            self._moved[key] = Channels(channels.mean.to(device), channels.deviation.to(device))
        return self._moved[key]

    def first_beyond(self, batch: Batch, name: str, rows: NDArray[np.bool_]) -> str:
        """Run the teacher again and describe the first value that cannot be stored.

        Args:
            batch: The batch.
            name: The signal.
            rows: Mask of the signal's rows in the batch to look at.
        """
        for feature, values in self._teacher.values(batch):
            if name not in {signal.name for signal in self._signals.get(feature, ())}:
                continue
            chosen: dict[str, list[Tensor]] = {}
            first = 0
            for piece in self._teacher.pieces(feature, values):
                count = len(next(iter(piece.values())))
                mask = torch.from_numpy(rows[first : first + count])
                for key, value in piece.items():
                    chosen.setdefault(key, []).append(value[mask.to(value.device)])
                first += count
            return _first_beyond({key: torch.cat(pieces) for key, pieces in chosen.items()})
        raise KeyError(name)


def encode_rows(form: Form, values: Values, channels: Channels | None) -> Encoded:
    """Encode float32 rows and tell which of them are finite before and after encoding.

    A finite value may exceed the range of its form, such as 65,504 for float16.
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
    """Tell for each row if all values are finite; the reductions keep NaN, which compares false."""
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


def _first_beyond(values: Mapping[str, Tensor]) -> str:
    """Describe the first value that is not finite, else the largest, which exceeds the range."""
    flat = torch.cat([value.flatten().float() for value in values.values()])
    beyond = flat[~(flat.abs() <= LARGEST)]
    if len(beyond):
        return f"{beyond[0].item():g}"
    return f"{flat[flat.abs().argmax()].item():g}, beyond the form's range"
