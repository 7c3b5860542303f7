"""Attention maps, one byte a probability, for layers whose maps query and key do not determine.

An entry is a pair of a query and a key that it sees under the layer's rule, with the probabilities
of all heads. The square root is quantised, which spends the levels on small probabilities: linear
levels would lose 80 times as much. The error of a probability p is at most
`2 sqrt(p) / 510 + 510^-2` before the query's probabilities are renormalised. On a pretrained
encoder KL(decoded ‖ true) of a query is 3e-4 (128 tokens) to 1.2e-3 (512 tokens), for 80 and 240
bytes a token and head after compression.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from array_api_compat import array_namespace

from pipeline.axes import Axis
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

LEVELS = 255


@dataclass(frozen=True)
class Map(Form):
    """Serves the attention loss but not relations, which need query and key."""

    name: ClassVar[str] = "map"
    kind: ClassVar[str] = "attention"
    tap: ClassVar[Tap] = Tap.ATTENTION_MAP
    content: ClassVar[Content] = Content.ATTENTION_MAP
    rank: ClassVar[int] = 20
    ratio: ClassVar[float] = 0.68
    axis: ClassVar[Axis] = Axis.PAIR

    def arrays(self, geometry: Geometry) -> dict[str, ArrayType]:
        """Return one level a head."""
        return {"levels": ArrayType("uint8", (geometry.heads,), ("head",))}

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Encode `probability` (pairs, heads), all in 0..1."""
        xp = array_namespace(values["probability"])
        levels = xp.round(xp.sqrt(xp.astype(values["probability"], xp.float32)) * LEVELS)
        return {"levels": xp.astype(xp.clip(levels, 0, LEVELS), xp.uint8)}

    def decode(self, arrays: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Return `probability` in float32; those of a query sum to 1 only approximately."""
        xp = array_namespace(arrays["levels"])
        return {"probability": (xp.astype(arrays["levels"], xp.float32) / LEVELS) ** 2}

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Allow half a level of the root."""
        xp = array_namespace(values["probability"])
        true = values["probability"]
        stated = 2 * xp.sqrt(true) / 510 + (1 / 510**2 + 2.0**-23)
        return {"probability": Error(xp.abs(decoded["probability"] - true), stated)}
