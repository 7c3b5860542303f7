"""The class logits of an example in float32: a handful of numbers, stored exactly."""

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


@dataclass(frozen=True)
class Dense(Form):
    """Serves the output loss of classifiers at every temperature."""

    name: ClassVar[str] = "dense"
    kind: ClassVar[str] = "logits"
    tap: ClassVar[Tap] = Tap.LOGITS
    content: ClassVar[Content] = Content.LOGITS
    rank: ClassVar[int] = 10
    ratio: ClassVar[float] = 0.95
    axis: ClassVar[Axis] = Axis.EXAMPLE
    shows_nonfinite: ClassVar[bool] = True

    def arrays(self, geometry: Geometry) -> dict[str, ArrayType]:
        """Return one array of `vocab` logits an example, which here are classes."""
        return {"logits": ArrayType("float32", (geometry.vocab,), ("output",))}

    def encode(self, values: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Store `logits` (examples, classes) as they are."""
        xp = array_namespace(values["logits"])
        return {"logits": xp.astype(values["logits"], xp.float32)}

    def decode(self, arrays: Mapping[str, Array], channels: Channels | None) -> dict[str, Array]:
        """Return `logits` in float32."""
        return {"logits": arrays["logits"]}

    def errors(
        self, values: Mapping[str, Array], decoded: Mapping[str, Array], channels: Channels | None
    ) -> dict[str, Error]:
        """Allow no error."""
        xp = array_namespace(values["logits"])
        true = values["logits"]
        return {"logits": Error(xp.abs(decoded["logits"] - true), xp.zeros_like(true))}
