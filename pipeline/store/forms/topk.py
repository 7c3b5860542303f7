"""Logits as the k most probable tokens; the probability of all others becomes one ghost class.

The stored log-probabilities refer to the full vocabulary and are never renormalised: renormalised
over the top 32, the gradient would point elsewhere (cosine 0.486 with the true one); with the ghost
class the cosine is 0.973 to 0.9995. The logsumexp over the full vocabulary is stored for each
temperature, because it cannot be computed from that of another. The error of a log-probability is
at most 2^-11 of its size (float16). The ids ascend and are stored as the gaps between them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from array_api_compat import array_namespace, is_torch_array
from numpy.typing import NDArray
from pydantic import Field

from pipeline.errors import IncompatibleError
from pipeline.store.forms.form import (
    Array,
    ArrayType,
    Channels,
    Content,
    Error,
    Form,
    Geometry,
    Tap,
    row_blocks,
)
from pipeline.store.forms.ids import GAPS, IDS, gap_type, gaps_of, ids_of

GROUP = 16
"""Columns of which at first only the largest is considered."""
BLOCK_LOGITS = 2**18
"""1 MiB of float32, large enough for the cost of starting a block not to matter."""


def log_softmax(values: Array) -> Array:
    """Return log-probabilities along the last axis; the largest value is subtracted first."""
    xp = array_namespace(values)
    shifted = values - xp.max(values, axis=-1, keepdims=True)
    return shifted - xp.log(xp.sum(xp.exp(shifted), axis=-1, keepdims=True))


def log_sum_exp(values: Array) -> Array:
    """Return log Σ exp along the last axis, without overflow."""
    xp = array_namespace(values)
    largest = xp.max(values, axis=-1, keepdims=True)
    return xp.log(xp.sum(xp.exp(values - largest), axis=-1)) + largest[..., 0]


def largest(values: Array, k: int) -> tuple[Array, Array]:
    """Return the `k` largest entries of each row and their columns, columns ascending.

    NaN counts as the largest. The array library decides which of several equal entries at the
    threshold are kept.
    """
    if not is_torch_array(values):
        columns = _largest_columns(values, k)
        return np.take_along_axis(values, columns, axis=-1), columns
    if values.device.type == "cpu":
        columns = array_namespace(values).asarray(_largest_columns(values.detach().numpy(), k))
    else:
        columns = values.topk(k, dim=-1, sorted=False).indices.sort(dim=-1).values
    return values.gather(-1, columns), columns


def _largest_columns(values: NDArray[Any], k: int) -> NDArray[np.int64]:
    """Select groups of columns by their maxima first, which is one pass over the row.

    The k largest entries are in the k groups with the largest maxima. This is five times as fast as
    a selection from all columns.
    """
    rows, width = values.shape
    groups = width // GROUP
    if groups <= 2 * k:
        return np.sort(np.argpartition(values, -k, axis=-1)[:, -k:], axis=-1)
    grouped = values[:, : groups * GROUP].reshape(rows, GROUP, groups)
    chosen = np.argpartition(grouped.max(axis=1), -k, axis=-1)[:, -k:]
    members = (chosen[:, None, :] + groups * np.arange(GROUP)[:, None]).reshape(rows, k * GROUP)
    rest = np.broadcast_to(np.arange(groups * GROUP, width), (rows, width - groups * GROUP))
    columns = np.concatenate([members, rest], axis=-1)
    candidates = values.reshape(-1).take(columns + width * np.arange(rows)[:, None])
    best = np.argpartition(candidates, -k, axis=-1)[:, -k:]
    return np.sort(np.take_along_axis(columns, best, axis=-1), axis=-1)


@dataclass(frozen=True)
class TopK(Form):
    """Serves the output loss of language models at the captured temperatures."""

    k: Annotated[int, Field(ge=1)] = 64
    temperatures: Annotated[
        tuple[Annotated[float, Field(gt=0, allow_inf_nan=False)], ...], Field(min_length=1)
    ] = (1.0,)

    name: ClassVar[str] = "topk"
    version: ClassVar[int] = 2
    kind: ClassVar[str] = "logits"
    tap: ClassVar[Tap] = Tap.LOGITS
    content: ClassVar[Content] = Content.TOP_K
    rank: ClassVar[int] = 30
    ratio: ClassVar[float] = 0.55
    shows_nonfinite: ClassVar[bool] = True
    ids_array: ClassVar[str] = GAPS

    @property
    def temperatures_served(self) -> tuple[float, ...]:
        """The temperatures of the stored normalisers."""
        return self.temperatures

    @classmethod
    def variants(cls, temperatures: tuple[float, ...]) -> list[Form]:
        """Return several k: with 64 a student's loss was 1.9% higher, with 16 6.7%."""
        return [cls(k, temperatures) for k in (256, 64, 16)]

    def as_written_by(self, version: int) -> Form | None:
        """Return this form, or the one that reads version 1."""
        return TopK1(self.k, self.temperatures) if version == 1 else super().as_written_by(version)

    def arrays(self, geometry: Geometry) -> dict[str, ArrayType]:
        """Return ids and log-probabilities of `k` tokens, and a normaliser for each temperature."""
        if not 0 < self.k < geometry.vocab:
            raise IncompatibleError(
                f"logits form topk: k is {self.k}, the teacher's vocabulary {geometry.vocab}; "
                "choose 0 < k < vocabulary, or the form head, which keeps all of it"
            )
        return {
            self.ids_array: gap_type(geometry.vocab, self.k),
            "log_probs": ArrayType("float16", (self.k,), ("id",)),
            "log_normalizer": ArrayType("float32", (len(self.temperatures),), ("temperature",)),
        }

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Encode `logits` (tokens, vocab); the softmax is over the full vocabulary."""
        xp = array_namespace(values["logits"])
        logits = xp.astype(values["logits"], xp.float32, copy=False)
        # Rows that are not finite must not warn here; the capture refuses them.
        with np.errstate(invalid="ignore"):
            blocks = self._reduced(logits)
            top, ids, least, total, *sums = (xp.concat(column) for column in blocks)
            most = xp.max(top, axis=-1, keepdims=True)
            total, *sums = (xp.log(xp.astype(value, xp.float64)) for value in (total, *sums))
            # At temperature 1 probabilities sum to 1, so the normaliser is 0.
            others = iter(sums)
            normalizers = [
                xp.zeros_like(total) if t == 1.0 else next(others) - total / t
                for t in self.temperatures
            ]
        normalizer = xp.astype(xp.stack(normalizers, axis=-1), xp.float32)
        # An entry of minus infinity would not show: its probability is 0, as for small ones.
        is_finite = xp.isfinite(least)[:, None]
        return {
            GAPS: gaps_of(ids, logits.shape[-1]),
            "log_probs": xp.astype(xp.astype(top - most, xp.float64) - total[:, None], xp.float16),
            "log_normalizer": xp.where(is_finite, normalizer, xp.full_like(normalizer, xp.nan)),
        }

    def _reduced(self, logits: Array) -> list[list[Array]]:
        """Reduce the full vocabulary block by block to what is stored.

        The result has a list of blocks for each of: the largest entries, their ids, the difference
        of the least and the largest entry, and Σ exp((z - largest) / t) at temperature 1 and at
        each other temperature.
        """
        xp = array_namespace(logits)
        temperatures = [1.0, *(t for t in self.temperatures if t != 1.0)]
        pieces: list[list[Array]] = []
        room = None
        for block in row_blocks(logits, BLOCK_LOGITS):
            rows = logits[block]
            top, ids = largest(rows, self.k)
            most = xp.max(top, axis=-1, keepdims=True)
            # Allocating this much memory anew costs more than the arithmetic.
            room = xp.empty_like(rows) if room is None else room[: rows.shape[0]]
            piece = [top, ids]
            for temperature in temperatures:
                xp.subtract(rows, most, out=room)
                if temperature == 1.0:
                    piece.append(xp.min(room, axis=-1))
                else:
                    xp.divide(room, temperature, out=room)
                xp.exp(room, out=room)
                piece.append(xp.sum(room, axis=-1))
            pieces.append(piece)
        return [list(column) for column in zip(*pieces, strict=True)]

    def decode(self, arrays: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Return `ids` (int64), `log_probs` at temperature 1, and every `log_normalizer`."""
        xp = array_namespace(arrays["log_probs"])
        return {
            "ids": ids_of(arrays),
            "log_probs": xp.astype(arrays["log_probs"], xp.float32),
            "log_normalizer": arrays["log_normalizer"],
        }

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Allow the rounding of float16, and of sums in float32.

        The error of `ids` is how much more probable, in nats, the best token that is left out is
        than the worst that is kept.
        """
        xp = array_namespace(values["logits"])
        log_probs = log_softmax(xp.astype(values["logits"], xp.float64))
        ids = decoded["ids"]
        true = xp.take_along_axis(log_probs, ids, axis=-1)
        best, _ = largest(log_probs, self.k)
        missed = xp.min(best, axis=-1) - xp.min(true, axis=-1)
        rounding = 2.0**-20 * (1 + xp.abs(xp.min(true, axis=-1)))
        normalizers = xp.stack([log_sum_exp(log_probs / t) for t in self.temperatures], axis=-1)
        return {
            "ids": Error(missed, rounding),
            "log_probs": Error(
                xp.abs(decoded["log_probs"] - true), xp.abs(true) * 2.0**-11 + 2.0**-20
            ),
            "log_normalizer": Error(
                xp.abs(decoded["log_normalizer"] - normalizers),
                2.0**-20 * (1 + xp.abs(normalizers)),
            ),
        }


@dataclass(frozen=True)
class TopK1(TopK):
    """Version 1, which stored the ids themselves; it is read and no longer written."""

    version: ClassVar[int] = 1
    ids_array: ClassVar[str] = IDS
