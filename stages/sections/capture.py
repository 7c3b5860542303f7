"""Section `teachers.T.capture`: which layers are stored, in which form, of how much text."""

import dataclasses
import difflib
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from pipeline.provenance import canonical_json
from pipeline.store.forms.form import Form
from pipeline.store.forms.registry import FORMS
from pipeline.teacher.capture.request import LayerRequest
from pipeline.teacher.capture.spec import SegmentOptions
from stages.parameters import Section

Positive = Annotated[int, Field(ge=1)]
Kind = Literal["hidden", "attention", "value", "logits"]


class Every(Section):
    """Every n-th layer, counted back from the last."""

    every: Positive


Layers = Literal["all"] | Every | list[int]


class FormIn(Section):
    """The form of a signal; further keys are the form's own options."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    form: str

    def build(self, kind: Kind) -> Form:
        """Return the form.

        Raises:
            ValueError: If there is no such form or option, or an option has another type.
        """
        if self.form not in FORMS[kind]:
            raise ValueError(
                f"{kind}.form: found {self.form!r}, expected one of {', '.join(FORMS[kind])}"
            )
        form = FORMS[kind][self.form]
        options = self.model_extra or {}
        known = [field.name for field in dataclasses.fields(form)]  # pyright: ignore[reportArgumentType]
        for key in options:
            if key not in known:
                close = difflib.get_close_matches(key, [*known, *type(self).model_fields], n=1)
                advice = f"did you mean {close[0]!r}?" if close else "remove it"
                raise ValueError(f"{kind}.{key}: the form {self.form} has no such option; {advice}")
        try:
            return TypeAdapter(form).validate_json(canonical_json(options), strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join([kind, *map(str, first["loc"])])
            expected = first["msg"].replace("Input should be", "expected")
            raise ValueError(f"{place}: found {first['input']!r}, {expected}") from error


class LayersIn(FormIn):
    """Layers of one kind in one form."""

    layers: Layers

    def request(self, kind: Literal["hidden", "attention", "value"]) -> LayerRequest:
        """Return the library's words for it."""
        return LayerRequest(kind, plain_layers(self.layers), self.build(kind))


class ValuesIn(LayersIn):
    """Values of layers; there is one form of them."""

    form: str = "int8"


class CaptureParams(Section):
    """Section `teachers.T.capture`."""

    hidden: LayersIn | tuple[LayersIn, ...] = ()
    attention: LayersIn | tuple[LayersIn, ...] = ()
    value: ValuesIn | None = None
    logits: FormIn | None = None
    blocks: Layers | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] = 1.0
    limit: Positive | None = None
    segment_tokens: Positive = 16384
    chunk_tokens: Positive = 256
    batch_tokens: Positive | Literal["auto"] = 8192
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    seed: Annotated[int, Field(ge=0)] = 0
    nonfinite: Literal["stop", "skip"] = "stop"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.segment_tokens % self.chunk_tokens:
            raise ValueError(
                f"segment_tokens is {self.segment_tokens}, expected a multiple of chunk_tokens, "
                f"{self.chunk_tokens}; change one of them"
            )
        signals = [*self.requests(), self.logits_form(), self.blocks]
        if all(signal is None for signal in signals):
            raise ValueError("nothing to capture; add hidden, attention, value, logits or blocks")
        return self

    def requests(self) -> list[LayerRequest]:
        """Return hidden states, then attention, then values."""
        hidden = self.hidden if isinstance(self.hidden, tuple) else [self.hidden]
        attention = self.attention if isinstance(self.attention, tuple) else [self.attention]
        return [
            *(one.request("hidden") for one in hidden),
            *(one.request("attention") for one in attention),
            *([] if self.value is None else [self.value.request("value")]),
        ]

    def segments(self) -> SegmentOptions:
        """Return how the corpus is cut."""
        names = [field.name for field in dataclasses.fields(SegmentOptions)]
        return SegmentOptions(**{name: getattr(self, name) for name in names})

    def logits_form(self) -> Form | None:
        """Return the form of the logits, if they are asked for."""
        return None if self.logits is None else self.logits.build("logits")


def plain_layers(layers: Layers) -> Any:
    """Return `all`, `{"every": n}` or a list, as the library takes them."""
    return {"every": layers.every} if isinstance(layers, Every) else layers
