"""Hidden states in bfloat16, stored as uint16 bit patterns because Zarr has no such dtype.

The relative error is at most 2^-8, the range that of float32. A value takes about 1.5 bytes after
compression.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from array_api_compat import array_namespace

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


@dataclass(frozen=True)
class BFloat16(Form):
    """Serves the feature loss and, inside `head`, the output loss."""

    name: ClassVar[str] = "bfloat16"
    kind: ClassVar[str] = "hidden"
    tap: ClassVar[Tap] = Tap.HIDDEN
    content: ClassVar[Content] = Content.HIDDEN
    rank: ClassVar[int] = 20
    ratio: ClassVar[float] = 0.8

    def arrays(self, geometry: Geometry) -> dict[str, ArrayType]:
        """Return one uint16 array of `width` channels."""
        return {"values_bits": ArrayType("uint16", (geometry.width,), ("channel",))}

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Round to nearest even by integer arithmetic on the float32 bits."""
        xp = array_namespace(values["hidden"])
        bits = xp.astype(values["hidden"], xp.float32).view(xp.int32)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)
        return {"values_bits": xp.astype((rounded >> 16) & 0xFFFF, xp.uint16)}

    def decode(self, arrays: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Widen to float32, exactly."""
        xp = array_namespace(arrays["values_bits"])
        return {"hidden": (xp.astype(arrays["values_bits"], xp.int32) << 16).view(xp.float32)}

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Allow 2^-8 of the value."""
        xp = array_namespace(values["hidden"])
        true = values["hidden"]
        stated = xp.abs(true) * 2.0**-8 + 2.0**-133
        return {"hidden": Error(xp.abs(decoded["hidden"] - true), stated)}
