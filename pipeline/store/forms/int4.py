"""Hidden states as int4: standardised like int8, then quantised to 16 levels by channel group.

This takes a quarter of the bytes of float16 after compression (0.46 to 0.49 bytes a value with
groups of 64). The relative L2 error of 0.09 to 0.10 is noise that a student averages out. The
levels are the middles of 16 equal steps from `-max|z|` to `max|z|`, the group's largest
standardised value: as none of them is zero, a step is an eighth of the largest value instead of a
seventh. The error is at most half a step, `0.501 * max|z| / 8 + 2^-24` of a channel's deviation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from array_api_compat import array_namespace

from pipeline.store.forms.form import (
    Array,
    ArrayType,
    Channels,
    Error,
    Geometry,
    StandardisedForm,
    row_blocks,
)
from pipeline.store.forms.int8 import SMALLEST

HALF = 8
"""Levels on either side of zero."""


@dataclass(frozen=True)
class Int4(StandardisedForm):
    """Serves the feature loss. Attention that is rebuilt from it is not faithful."""

    group: Literal[16, 32, 64, 128] = 64

    name: ClassVar[str] = "int4"
    rank: ClassVar[int] = 50
    ratio: ClassVar[float] = 0.94
    shows_nonfinite: ClassVar[bool] = True

    def _groups(self, width: int) -> tuple[int, int]:
        """Return the number of groups and the channels of each; the last group is padded."""
        size = min(self.group, width + width % 2)
        return -(-width // size), size

    def arrays(self, geometry: Geometry) -> dict[str, ArrayType]:
        """Return two levels a byte, the first in its upper half, and a scale a group."""
        groups, size = self._groups(geometry.width)
        return {
            "levels": ArrayType("uint8", (groups * size // 2,), ("channel_pair",)),
            "scale": ArrayType("float16", (groups,), ("group",)),
        }

    def _grouped(self, rows: Array) -> Array:
        """Return float32 rows as (tokens, groups, size), padded with zeros."""
        xp = array_namespace(rows)
        groups, size = self._groups(rows.shape[-1])
        if missing := groups * size - rows.shape[-1]:
            rows = xp.concat([rows, xp.zeros_like(rows[:, :missing])], axis=-1)
        return xp.reshape(rows, (rows.shape[0], groups, size))

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Standardise, then quantise each group of each token with its own scale.

        The scale is widened before it is rounded to float16, so that no level is clipped.
        """
        assert channels is not None
        hidden = values["hidden"]
        xp = array_namespace(hidden)
        groups, size = self._groups(hidden.shape[-1])
        place = {"device": hidden.device}
        packed = xp.empty((hidden.shape[0], groups * size // 2), dtype=xp.uint8, **place)
        scale = xp.empty((hidden.shape[0], groups), dtype=xp.float16, **place)
        # In rows that are not finite the levels mean nothing, and the scale shows it.
        with np.errstate(over="ignore", invalid="ignore"):
            for block in row_blocks(hidden):
                rows = xp.astype(hidden[block], xp.float32, copy=False)
                rows = self._grouped(channels.standardise(rows))
                largest = xp.max(xp.abs(rows), axis=-1)
                # Widened as in int8: by 2^-10, and by one subnormal of float16.
                step = xp.astype(largest * ((1 + 2.0**-10) / HALF) + SMALLEST, xp.float16)
                levels = xp.floor(rows / xp.astype(step, xp.float32)[..., None]) + HALF
                levels = xp.astype(levels, xp.uint8)
                pairs = levels[..., 0::2] * 16 + levels[..., 1::2]
                scale[block] = step
                packed[block] = xp.reshape(pairs, (rows.shape[0], groups * size // 2))
        return {"levels": packed, "scale": scale}

    def decode_standardised(self, arrays: Mapping[str, Array], channels: Channels) -> Array:
        """Return the middle of each level times the scale of its group."""
        packed, scale = arrays["levels"], arrays["scale"]
        xp = array_namespace(packed)
        rows, width = packed.shape[0], channels.mean.shape[0]
        levels = xp.stack([packed >> 4, packed & 15], axis=-1)
        levels = xp.reshape(xp.astype(levels, xp.float32), (rows, *self._groups(width)))
        # With explicit sizes, not -1: there may be no rows.
        standardised = (levels - (HALF - 0.5)) * xp.astype(scale, xp.float32)[..., None]
        return xp.reshape(standardised, (rows, 2 * packed.shape[1]))[:, :width]

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Allow half a step of the group's scale, in deviations of each channel."""
        assert channels is not None
        true = values["hidden"]
        xp = array_namespace(true)
        grouped = self._grouped(channels.standardise(true))
        largest = xp.max(xp.abs(grouped), axis=-1, keepdims=True)
        half_step = 0.501 * largest / HALF + SMALLEST + xp.zeros_like(grouped)
        groups, size = self._groups(true.shape[-1])
        half_step = xp.reshape(half_step, (true.shape[0], groups * size))[:, : true.shape[-1]]
        # What float32 loses on the way to standardised values and back.
        rounding = (xp.abs(true) + xp.abs(channels.mean)) * 2.0**-22
        stated = half_step * channels.deviation + rounding
        return {"hidden": Error(xp.abs(decoded["hidden"] - true), stated)}
