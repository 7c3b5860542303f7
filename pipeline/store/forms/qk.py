"""Attention as query and key: O(tokens · width) bytes instead of O(tokens²) for the maps.

Query (after rotary) and key (after rotary, before head repetition) are quantised to int8 per token
and head. Readers rebuild the map as softmax(Q Kᵀ · scaling + mask). On a pretrained encoder
decoded and true maps differ by a KL of 4e-5 to 8e-5 a query. The error of query and key is at most
half a step of the scale of their token and head.
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
class QueryKey(Form):
    """Serves the attention loss."""

    name: ClassVar[str] = "qk"
    kind: ClassVar[str] = "attention"
    tap: ClassVar[Tap] = Tap.QUERY_KEY
    content: ClassVar[Content] = Content.QUERY_KEY
    rank: ClassVar[int] = 10
    ratio: ClassVar[float] = 0.95
    shows_nonfinite: ClassVar[bool] = True

    def arrays(self, geometry: Geometry) -> dict[str, ArrayType]:
        """Return levels and one scale a head, for query and key; the key may have fewer heads."""
        return {
            "query": ArrayType("int8", (geometry.heads, geometry.d_head), ("head", "channel")),
            "query_scale": ArrayType("float16", (geometry.heads,), ("head",)),
            "key": ArrayType("int8", (geometry.kv_heads, geometry.d_head), ("kv_head", "channel")),
            "key_scale": ArrayType("float16", (geometry.kv_heads,), ("kv_head",)),
        }

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Quantise `query` (tokens, heads, d_head) and `key` (tokens, kv_heads, d_head)."""
        query, query_scale = quantise_rows(values["query"])
        key, key_scale = quantise_rows(values["key"])
        return {"query": query, "query_scale": query_scale, "key": key, "key_scale": key_scale}

    def decode(self, arrays: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Return `query` and `key` in float32."""
        return {
            "query": widen_rows(arrays["query"], arrays["query_scale"]),
            "key": widen_rows(arrays["key"], arrays["key_scale"]),
        }

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Allow half a step of the token and head."""
        xp = array_namespace(values["query"])
        return {
            name: Error(xp.abs(decoded[name] - values[name]), largest_error(values[name]))
            for name in ("query", "key")
        }
