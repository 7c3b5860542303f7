"""Attention that stores nothing: query and key are rebuilt from the hidden states below.

Query and key of block l are a function of `hidden/l-1` and of the block's norm and projections,
which are stored once, as an asset. The error is that of the hidden states' form, propagated: a KL
of 1.2e-4 for int8 and 1e-7 for float16.
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
    """Serves the attention loss, relations included, at the cost of a few matrix products."""

    name: ClassVar[str] = "below"
    kind: ClassVar[str] = "attention"
    tap: ClassVar[Tap] = Tap.LAYER_BELOW
    content: ClassVar[Content] = Content.QUERY_KEY
    rank: ClassVar[int] = 30

    def needs(self, layer: int | None) -> dict[str, int]:
        """Return the layer of the hidden states."""
        assert layer is not None
        return {"hidden": layer - 1}

    def assets(self, layer: int | None) -> tuple[str, ...]:
        """Return the asset with the parameters that run before the block's attention."""
        return (f"attention-{layer}",)

    def arrays(self, geometry: Geometry) -> dict[str, ArrayType]:
        """Return no arrays: the declaration names the hidden states and the asset."""
        return {}

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Store nothing."""
        return {}

    def decode(self, arrays: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Return nothing: readers rebuild query and key from the hidden states."""
        return {}

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Return nothing: the form of the hidden states states its own error."""
        return {}
