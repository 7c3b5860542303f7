"""Attention at no stored byte: rebuilt from the hidden state below by the block's own parameters.

Query and key of block l are a function of `hidden/l-1` alone, and what computes them (a norm and
two or three projections) is stored once, in the assets. The error is that of the hidden state's
form, seen through them: a KL of 1.2e-4 from int8, 1e-7 from float16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

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
class Below(Form):
    """Serves the attention loss, its relations too, for the price of some matrix products."""

    name: ClassVar[str] = "below"
    kind: ClassVar[str] = "attention"
    tap: ClassVar[Tap] = Tap.LAYER_BELOW
    content: ClassVar[Content] = Content.QUERY_KEY
    rank: ClassVar[int] = 30

    def needs(self, layer: int | None) -> dict[str, int]:
        """The hidden states below."""
        assert layer is not None
        return {"hidden": layer - 1}

    def assets(self, layer: int | None) -> tuple[str, ...]:
        """The parameters that run before the block's attention."""
        return (f"attention-{layer}",)

    def arrays(self, geometry: Geometry) -> dict[str, ArrayType]:
        """No arrays: the declaration names the hidden state and the asset."""
        return {}

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Store nothing."""
        return {}

    def decode(self, arrays: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Return nothing: whoever has the hidden state rebuilds query and key from it."""
        return {}

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Nothing stored, nothing off: the hidden state below states its own."""
        return {}
