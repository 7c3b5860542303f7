"""Logits as `n` ids drawn from the teacher's distribution: unbiased, and the fewest bytes.

Sparse Logit Sampling (arXiv 2503.16870): the top k distort the gradient, while the expectation of
the mean over samples is the gradient of the full distribution. Draws are systematic: with one
offset a token, the points (offset + j) / n go through the inverse CDF. An id of probability p is
thus drawn within one of n·p times, which independent draws do not guarantee, and the ids come out
sorted, so that the gaps between them can be stored, which compress.

The offset is a hash of the token's own logits, so a token draws the same ids in any batch and after
any interruption. Tokens with equal logits draw equal ids too: over repeated contexts the error of a
draw does not average out.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from array_api_compat import array_namespace, is_torch_array
from pydantic import Field

from pipeline.store.forms.form import (
    Array,
    ArrayType,
    Channels,
    Content,
    Error,
    Form,
    Geometry,
    Tap,
)
from pipeline.store.forms.ids import GAPS, IDS, gap_type, gaps_of, ids_of
from pipeline.store.forms.topk import log_softmax

CHUNK_LOGITS = 2**22
"""Logits that exist in float64 at a time: 32 MiB a copy."""
DEVICE_LOGITS = 2**24
"""The same on a GPU, which wants enough work for each kernel launch: 128 MiB a copy."""
MULTIPLIERS = (-7046029254386353131, -4658895280553007687, -7723592293110705685)
"""Odd 64-bit constants with well-mixed bits, from the golden ratio and from splitmix64."""


def row_offsets(logits: Array) -> Array:
    """Return a float64 in [0, 1) for each row: a hash of the bits of its float32 logits.

    The arithmetic is in integers modulo 2^64, so the order of summation does not matter.
    """
    xp = array_namespace(logits)
    bits = xp.astype(logits.view(xp.int32), xp.int64)
    place = xp.arange(logits.shape[-1], dtype=xp.int64, device=logits.device)
    mixed = (bits + place) * MULTIPLIERS[0]
    hashed = xp.sum((mixed ^ (mixed >> 29)) * MULTIPLIERS[1], axis=-1, dtype=xp.int64)
    for multiplier in MULTIPLIERS[1:]:
        hashed = (hashed ^ (hashed >> 30)) * multiplier
    return xp.astype((hashed >> 11) & (2**53 - 1), xp.float64) * 2.0**-53


def systematic_counts(cumulative: Array, offsets: Array, n: int) -> Array:
    """Return how many of the points (offset + j) / n, j < n, each entry gets (int64).

    Args:
        cumulative: CDF of each row, float64, ending in exactly 1.
        offsets: One for each row, in [0, 1).
        n: Number of points, to which the counts of each row sum.
    """
    xp = array_namespace(cumulative)
    below = xp.clip(xp.ceil(n * cumulative - offsets[:, None]), 0, n)
    before = xp.concat([xp.zeros_like(below[:, :1]), below[:, :-1]], axis=-1)
    return xp.astype(below - before, xp.int64)


def draw(logits: Array, n: int) -> Array:
    """Return `n` ids (int64, ascending) for each row of float32 logits."""
    xp = array_namespace(logits)
    cumulative = xp.cumulative_sum(xp.exp(log_softmax(xp.astype(logits, xp.float64))), axis=-1)
    cumulative = cumulative / cumulative[:, -1:]
    counts = systematic_counts(cumulative, row_offsets(logits), n).reshape(-1)
    ids = xp.tile(
        xp.arange(logits.shape[-1], dtype=xp.int64, device=logits.device), (logits.shape[0],)
    )
    rows = logits.shape[0]
    if is_torch_array(ids):
        # The size is known; a GPU would have to be asked for it.
        drawn = ids.repeat_interleave(counts, output_size=rows * n)
    else:
        drawn = np.repeat(ids, counts)
    return drawn.reshape(rows, n)


@dataclass(frozen=True)
class Sampled(Form):
    """Serves the output loss of language models as forward KL at temperature 1 only."""

    n: Annotated[int, Field(ge=1)] = 64

    name: ClassVar[str] = "sampled"
    version: ClassVar[int] = 2
    kind: ClassVar[str] = "logits"
    tap: ClassVar[Tap] = Tap.LOGITS
    content: ClassVar[Content] = Content.SAMPLES
    rank: ClassVar[int] = 40
    ratio: ClassVar[float] = 0.45
    ids_array: ClassVar[str] = GAPS

    @property
    def temperatures_served(self) -> tuple[float, ...]:
        """The temperature of the draws."""
        return (1.0,)

    @classmethod
    def variants(cls, temperatures: tuple[float, ...]) -> list[Form]:
        """Return several n: with 64 draws a student's loss was 0.05% higher."""
        return [cls(n) for n in (64, 16)]

    def as_written_by(self, version: int) -> Form | None:
        """Return this form, or the one that reads version 1."""
        return Sampled1(self.n) if version == 1 else super().as_written_by(version)

    def arrays(self, geometry: Geometry) -> dict[str, ArrayType]:
        """Return the gaps between the drawn ids, each id as often as it was drawn."""
        return {self.ids_array: gap_type(geometry.vocab, self.n)}

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Draw from `logits` (tokens, vocab); where they are not finite the ids mean nothing."""
        xp = array_namespace(values["logits"])
        logits = xp.astype(values["logits"], xp.float32)
        # The capture finds such rows by their values; they must only not raise here.
        finite = xp.all(xp.isfinite(logits), axis=-1, keepdims=True)
        logits = xp.where(finite, logits, xp.zeros_like(logits))
        most = CHUNK_LOGITS if str(logits.device) == "cpu" else DEVICE_LOGITS
        rows = max(1, most // logits.shape[-1])
        pieces = [logits[first : first + rows] for first in range(0, len(logits), rows)]
        drawn = xp.concat([draw(piece, self.n) for piece in pieces or [logits]], axis=0)
        return {GAPS: gaps_of(drawn, logits.shape[-1])}

    def decode(self, arrays: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Return `samples` (int64)."""
        return {"samples": ids_of(arrays)}

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Allow each id of probability p to be drawn within one of n·p times."""
        xp = array_namespace(values["logits"])
        expected = xp.exp(log_softmax(xp.astype(values["logits"], xp.float64))) * self.n
        tokens = xp.arange(expected.shape[-1], dtype=xp.int64, device=expected.device)
        counts = xp.zeros_like(expected)
        for place in range(self.n):
            counts = counts + (decoded["samples"][:, place : place + 1] == tokens)
        return {"samples": Error(xp.abs(counts - expected), xp.ones_like(expected) * (1 + 1e-9))}


@dataclass(frozen=True)
class Sampled1(Sampled):
    """Version 1, which stored the ids themselves; it is read and no longer written."""

    version: ClassVar[int] = 1
    ids_array: ClassVar[str] = IDS
