"""Logits as the input of the language-model head, which is itself stored once, as an asset.

All logits at any temperature take `width + 2` bytes a token in the inner form int8. The cosine of
a token's gradient with that of the full logits is 0.9998 to 0.9999. The error is that of the inner
form for hidden states, propagated through the head.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

from pipeline.store.forms.bfloat16 import BFloat16
from pipeline.store.forms.float16 import Float16
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
from pipeline.store.forms.int8 import Int8

HEAD = "lm_head"
"""The name of the asset that holds the head's weight and bias."""
INNER: dict[str, type[Float16 | BFloat16 | Int8]] = {
    "int8": Int8,
    "bfloat16": BFloat16,
    "float16": Float16,
}


@dataclass(frozen=True)
class Head(Form):
    """Serves the output loss of language models at every temperature."""

    values: Literal["int8", "bfloat16", "float16"] = "int8"

    name: ClassVar[str] = "head"
    kind: ClassVar[str] = "logits"
    tap: ClassVar[Tap] = Tap.HEAD_INPUT
    content: ClassVar[Content] = Content.LOGITS
    rank: ClassVar[int] = 20
    needs_channels: ClassVar[bool] = True

    @classmethod
    def variants(cls, temperatures: tuple[float, ...]) -> list[Form]:
        """Return a small and an exact inner form."""
        return [cls("bfloat16"), cls("int8")]

    @property
    def ratio(self) -> float:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The ratio of the inner form."""
        return INNER[self.values].ratio

    @property
    def shows_nonfinite(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the inner form does."""
        return INNER[self.values].shows_nonfinite

    def assets(self, layer: int | None) -> tuple[str, ...]:
        """Return the asset of the head, with which readers rebuild the logits."""
        return (HEAD,)

    def arrays(self, geometry: Geometry) -> dict[str, ArrayType]:
        """Return the arrays of the inner form."""
        return INNER[self.values]().arrays(geometry)

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Encode `head_input` (tokens, width)."""
        return INNER[self.values]().encode({"hidden": values["head_input"]}, channels)

    def decode(self, arrays: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Return `head_input` in float32."""
        return {"head_input": INNER[self.values]().decode(arrays, channels)["hidden"]}

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Return those of the inner form."""
        found = INNER[self.values]().errors(
            {"hidden": values["head_input"]}, {"hidden": decoded["head_input"]}, channels
        )
        return {"head_input": found["hidden"]}
