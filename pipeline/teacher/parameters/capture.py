"""Section `teachers.T.capture`: which layers are stored, in which form, of how much text."""

import dataclasses
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from pipeline.errors import ConfigError
from pipeline.section import Positive, Section
from pipeline.store.forms.form import Form
from pipeline.store.forms.registry import build_form
from pipeline.teacher.capture.request import LayerRequest
from pipeline.teacher.capture.spec import SegmentOptions


class Every(Section):
    """Every n-th layer, counted back from the last."""

    every: Positive


Layers = Literal["all"] | Every | list[int]


class FormIn(Section):
    """The form of a signal; further keys are the form's own options."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    form: str

    def options(self) -> dict[str, Any]:
        """Return the form's own options."""
        return self.model_extra or {}


class LayersIn(FormIn):
    """Layers of one kind in one form."""

    layers: Layers

    def request(self, kind: Literal["hidden", "attention", "value"]) -> LayerRequest:
        """Return the library's words for it."""
        form = build_form(kind, self.form, self.options())
        return LayerRequest(form, plain_layers(self.layers))


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
    def _fits(self) -> "CaptureParams":
        if self.segment_tokens % self.chunk_tokens:
            raise ValueError(
                f"segment_tokens is {self.segment_tokens}, expected a multiple of chunk_tokens, "
                f"{self.chunk_tokens}; change one of them"
            )
        try:
            signals = [*self.requests(), self.logits_form(), self.blocks]
        except ConfigError as error:
            raise ValueError(str(error)) from error
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
        logits = self.logits
        return None if logits is None else build_form("logits", logits.form, logits.options())


def plain_layers(layers: Layers) -> Any:
    """Return `all`, `{"every": n}` or a list, as the library takes them."""
    return {"every": layers.every} if isinstance(layers, Every) else layers
