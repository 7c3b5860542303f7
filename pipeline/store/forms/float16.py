"""Hidden states in IEEE half precision.

The relative error is at most 2^-11 above 6.1e-5; below, the absolute error is at most 2^-25. A
value takes about 1.8 bytes after compression. Values beyond 65,504 overflow, and the capture
refuses them as not finite.
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
    Content,
    Error,
    Form,
    Geometry,
    Tap,
)


@dataclass(frozen=True)
class Float16(Form):
    """Serves the feature loss and, inside `head`, the output loss."""

    name: ClassVar[str] = "float16"
    kind: ClassVar[str] = "hidden"
    tap: ClassVar[Tap] = Tap.HIDDEN
    content: ClassVar[Content] = Content.HIDDEN
    rank: ClassVar[int] = 10
    ratio: ClassVar[float] = 0.94
    shows_nonfinite: ClassVar[bool] = True

    def arrays(self, geometry: Geometry) -> dict[str, ArrayType]:
        """Return one float16 array of `width` channels."""
        return {"values": ArrayType("float16", (geometry.width,), ("channel",))}

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Round to nearest even. Overflow gives infinities, which the capture refuses."""
        xp = array_namespace(values["hidden"])
        with np.errstate(over="ignore"):
            return {"values": xp.astype(values["hidden"], xp.float16)}

    def decode(self, arrays: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Widen to float32, exactly."""
        xp = array_namespace(arrays["values"])
        return {"hidden": xp.astype(arrays["values"], xp.float32)}

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Allow 2^-11 of the value, or 2^-25 where that is more."""
        xp = array_namespace(values["hidden"])
        true = values["hidden"]
        stated = xp.abs(true) * 2.0**-11 + 2.0**-25
        return {"hidden": Error(xp.abs(decoded["hidden"] - true), stated)}
