"""Hidden states as int8: standardised by stored channel statistics, then scaled per token.

Hidden states of transformers have outlier channels, so one scale for a tensor would lose entire
tokens. Standardised and scaled per token, a value takes one byte, and a token two more. The error
is at most half a step, `0.501 * max|z| / 127 + 2^-24` of a channel's deviation, where `max|z|` is
the token's largest standardised value (0.7e-2 relative L2 on a pretrained encoder).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

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

LEVELS = 127
SMALLEST = 2.0**-24
"""The smallest float16. Added to a scale, it keeps rows of zeros and subnormals decodable."""


def quantise_rows(values: Array, channels: Channels | None = None) -> tuple[Array, Array]:
    """Quantise each vector along the last axis to int8 levels and one float16 scale.

    The scale is widened before it is rounded to float16, so that no level is clipped. A scale
    beyond 65,504 becomes infinite, which the capture refuses; that of a vector with a NaN is NaN.

    Args:
        values: The vectors; they are processed in blocks along the first axis.
        channels: Statistics to standardise them by; None leaves them as they are.
    """
    xp = array_namespace(values)
    place = {"device": values.device}
    levels = xp.empty(values.shape, dtype=xp.int8, **place)
    scale = xp.empty(values.shape[:-1], dtype=xp.float16, **place)
    # In vectors that are not finite the levels mean nothing.
    with np.errstate(over="ignore", invalid="ignore"):
        for block in row_blocks(values):
            rows = xp.astype(values[block], xp.float32, copy=False)
            if channels is not None:
                rows = channels.standardise(rows)
            largest = xp.max(xp.abs(rows), axis=-1)
            # Widened by 2^-10, as float16 rounds by 2^-11, and by one subnormal.
            step = xp.astype(largest * ((1 + 2.0**-10) / LEVELS) + SMALLEST, xp.float16)
            scale[block] = step
            levels[block] = xp.round(rows / xp.astype(step, xp.float32)[..., None])
    return levels, scale


def widen_rows(levels: Array, scale: Array) -> Array:
    """Return `levels * scale` in float32."""
    xp = array_namespace(levels)
    return xp.astype(levels, xp.float32) * xp.astype(scale, xp.float32)[..., None]


def largest_error(values: Array) -> Array:
    """Return the largest error of quantised vectors: half a step of each one's scale."""
    xp = array_namespace(values)
    return 0.501 * xp.max(xp.abs(values), axis=-1, keepdims=True) / LEVELS + SMALLEST


@dataclass(frozen=True)
class Int8(StandardisedForm):
    """Serves the feature loss and, inside `head`, the output loss."""

    name: ClassVar[str] = "int8"
    rank: ClassVar[int] = 30
    ratio: ClassVar[float] = 0.97
    shows_nonfinite: ClassVar[bool] = True

    def arrays(self, geometry: Geometry) -> dict[str, ArrayType]:
        """Return the levels of `width` channels and one scale a token."""
        return {
            "levels": ArrayType("int8", (geometry.width,), ("channel",)),
            "scale": ArrayType("float16", ()),
        }

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Standardise, then quantise each token with its own scale."""
        assert channels is not None
        levels, scale = quantise_rows(values["hidden"], channels)
        return {"levels": levels, "scale": scale}

    def decode_standardised(self, arrays: Mapping[str, Array], channels: Channels) -> Array:
        """Return levels times scales."""
        return widen_rows(arrays["levels"], arrays["scale"])

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Allow half a step of the token's scale, in deviations of each channel."""
        assert channels is not None
        xp = array_namespace(values["hidden"])
        true = values["hidden"]
        step = largest_error(channels.standardise(true))
        # What float32 loses on the way to standardised values and back.
        rounding = (xp.abs(true) + xp.abs(channels.mean)) * 2.0**-22
        stated = step * channels.deviation + rounding
        return {"hidden": Error(xp.abs(decoded["hidden"] - true), stated)}
