"""Hidden states in 8-bit floats (e4m3): standardised like int8, then scaled per token.

A value takes one byte, as in int8, but its error is relative: the small values of a token keep
their precision next to a large one, and the exponents compress. The error is at most
`0.0626 |z| + 2^-18 max|z| + 2^-33` of a channel's deviation, where `z` is the standardised value
and `max|z|` the token's largest (2.5e-2 relative L2).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import numpy as np
from array_api_compat import array_namespace
from numpy.typing import NDArray

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

LARGEST = 448
"""The largest e4m3 value: exponent 15, mantissa 6; mantissa 7 is NaN. There is no infinity."""
SIGN, NAN = 0x80, 0x7F
MANTISSA = 3
BIAS = 7


def _values() -> NDArray[np.float32]:
    """Return the value of each of the 256 bytes."""
    codes = np.arange(256)
    exponent, mantissa = (codes & NAN) >> MANTISSA, codes & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - BIAS)
    values = np.where(exponent > 0, normal, np.ldexp(mantissa / 8, 1 - BIAS))
    values = np.where((codes & NAN) == NAN, np.nan, values)
    return np.where(codes & SIGN, -values, values).astype(np.float32)


VALUES = _values()


def to_e4m3(values: Array) -> Array:
    """Round float32 values of at most 448 to the nearest e4m3 byte, with ties to even."""
    xp = array_namespace(values)
    bits = values.view(xp.int32)
    size = bits & 0x7FFFFFFF
    # The upper bits of a float32, rounded, are the byte, but for the bias of the exponent.
    dropped = 23 - MANTISSA
    rounded = (size + (2 ** (dropped - 1) - 1) + ((size >> dropped) & 1)) >> dropped
    normal = rounded - ((127 - BIAS) << MANTISSA)
    # Below the smallest normal value the steps are equal.
    subnormal = xp.astype(xp.round(xp.abs(values) * 2.0 ** (BIAS - 1 + MANTISSA)), xp.int32)
    byte = xp.where(size < (127 + 1 - BIAS) << 23, subnormal, normal)
    return xp.astype(xp.where(bits < 0, byte | SIGN, byte), xp.uint8)


@cache
def _table(xp: Any, device: Any) -> Array:
    """Copy the values to a device once: every copy would wait for it."""
    return xp.asarray(VALUES, device=device)


def of_e4m3(codes: Array) -> Array:
    """Return the float32 values of e4m3 bytes, exactly."""
    xp = array_namespace(codes)
    table = _table(xp, codes.device)
    flat = xp.astype(xp.reshape(codes, (-1,)), xp.int32)
    return xp.reshape(xp.take(table, flat, axis=0), codes.shape)


@dataclass(frozen=True)
class Float8(StandardisedForm):
    """Serves the feature loss. It is finer than int8 where a token has a few large values."""

    name: ClassVar[str] = "fp8"
    rank: ClassVar[int] = 40
    ratio: ClassVar[float] = 0.82
    shows_nonfinite: ClassVar[bool] = True

    def arrays(self, geometry: Geometry) -> dict[str, ArrayType]:
        """Return a byte for each of `width` channels and one scale a token."""
        return {
            "values_bits": ArrayType("uint8", (geometry.width,), ("channel",)),
            "scale": ArrayType("float16", ()),
        }

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Standardise, then scale each token so that its largest value is at most 448.

        The scale is widened before it is rounded to float16, so that no value is clipped.
        """
        assert channels is not None
        hidden = values["hidden"]
        xp = array_namespace(hidden)
        place = {"device": hidden.device}
        codes = xp.empty(hidden.shape, dtype=xp.uint8, **place)
        scale = xp.empty(hidden.shape[:-1], dtype=xp.float16, **place)
        # In rows that are not finite the bytes mean nothing, and the scale shows it.
        with np.errstate(over="ignore", invalid="ignore"):
            for block in row_blocks(hidden):
                rows = xp.astype(hidden[block], xp.float32, copy=False)
                rows = channels.standardise(rows)
                largest = xp.max(xp.abs(rows), axis=-1)
                # Widened as in int8: by 2^-10, and by one subnormal of float16.
                step = xp.astype(largest * ((1 + 2.0**-10) / LARGEST) + SMALLEST, xp.float16)
                scale[block] = step
                codes[block] = to_e4m3(rows / xp.astype(step, xp.float32)[..., None])
        return {"values_bits": codes, "scale": scale}

    def decode_standardised(self, arrays: Mapping[str, Array], channels: Channels) -> Array:
        """Return the value of each byte times the scale of its token."""
        xp = array_namespace(arrays["scale"])
        scale = xp.astype(arrays["scale"], xp.float32)[..., None]
        return of_e4m3(arrays["values_bits"]) * scale

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Allow half a unit in the last place of each standardised value."""
        assert channels is not None
        true = values["hidden"]
        xp = array_namespace(true)
        sizes = xp.abs(channels.standardise(true))
        largest = xp.max(sizes, axis=-1, keepdims=True)
        off = 0.0626 * sizes + 2.0**-18 * largest + 2.0**-33
        # What float32 loses on the way to standardised values and back.
        rounding = (xp.abs(true) + xp.abs(channels.mean)) * 2.0**-22
        return {
            "hidden": Error(xp.abs(decoded["hidden"] - true), off * channels.deviation + rounding)
        }
