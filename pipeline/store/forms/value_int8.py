"""Attention values as int8 per token and key head, quantised as `qk` quantises keys.

Relations between values (MiniLMv2, arXiv 2012.15828) compare teacher and student whatever their
head counts. The error of a value is at most half a step of the scale of its token and head.
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
from pipeline.store.forms.int8 import largest_error, quantise_rows, widen_rows


@dataclass(frozen=True)
class ValueInt8(Form):
    """Serves the attention loss with relations between values."""

    name: ClassVar[str] = "int8"
    kind: ClassVar[str] = "value"
    tap: ClassVar[Tap] = Tap.VALUE
    content: ClassVar[Content] = Content.VALUE
    rank: ClassVar[int] = 30
    ratio: ClassVar[float] = 0.97
    shows_nonfinite: ClassVar[bool] = True

    def arrays(self, geometry: Geometry) -> dict[str, ArrayType]:
        """Return levels and one scale a key head."""
        return {
            "value": ArrayType(
                "int8", (geometry.kv_heads, geometry.d_head), ("kv_head", "channel")
            ),
            "value_scale": ArrayType("float16", (geometry.kv_heads,), ("kv_head",)),
        }

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Quantise `value` (tokens, kv_heads, d_head)."""
        levels, scale = quantise_rows(values["value"])
        return {"value": levels, "value_scale": scale}

    def decode(self, arrays: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Return `value` in float32."""
        return {"value": widen_rows(arrays["value"], arrays["value_scale"])}

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Allow half a step of the token and head."""
        xp = array_namespace(values["value"])
        true = values["value"]
        return {"value": Error(xp.abs(decoded["value"] - true), largest_error(true))}
