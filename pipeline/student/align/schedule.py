"""How much a term of the loss counts as the run goes on: a constant, a straight line, a window."""

from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, RootModel, Tag, model_validator

NonNegative = Annotated[float, Field(ge=0, strict=True, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, strict=True, allow_inf_nan=False)]


class LinearWeight(BaseModel):
    """A weight that goes from `start` to `end` along a straight line, then stays.

    Attributes:
        start: Weight at the first step.
        end: Weight from `until` on.
        until: Share of the run after which `end` is reached.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    start: NonNegative
    end: NonNegative = 0.0
    until: Share = 1.0


class WindowWeight(BaseModel):
    """A weight that holds within a share of the run and is 0 before and after.

    Attributes:
        value: Weight inside the window.
        from_: Share of the run at which it begins; `from` in `params.yaml`.
        to: Share of the run at which it ends; the step at `to` itself is outside, unless it is 1.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", serialize_by_alias=True)

    value: NonNegative
    from_: Annotated[float, Field(ge=0, lt=1, strict=True, allow_inf_nan=False)] = Field(
        0.0, alias="from"
    )
    to: Share = 1.0

    @model_validator(mode="after")
    def _is_a_window(self) -> "WindowWeight":
        if self.from_ >= self.to:
            raise ValueError(f"from {self.from_}, to {self.to}: expected from below to; correct it")
        return self


def _alternative(weight: Any) -> str:
    """Say which way of writing a weight is meant, so that an error names a key of that one."""
    if isinstance(weight, WindowWeight) or (
        isinstance(weight, dict) and {"value", "from", "to"} & weight.keys()
    ):
        return "window"
    return "line" if isinstance(weight, dict | LinearWeight) else "constant"


AnyWeight: TypeAlias = Annotated[
    Annotated[NonNegative, Tag("constant")]
    | Annotated[LinearWeight, Tag("line")]
    | Annotated[WindowWeight, Tag("window")],
    Discriminator(_alternative),
]


class Weight(RootModel[AnyWeight]):
    """A term's weight in `params.yaml`: a number, `{start, end, until}` or `{value, from, to}`."""

    model_config = ConfigDict(frozen=True)

    @property
    def is_off(self) -> bool:
        """Whether the weight is 0 in the whole run; the term then needs no signal and no column."""
        if isinstance(self.root, LinearWeight):
            return self.root.start == 0 and self.root.end == 0
        if isinstance(self.root, WindowWeight):
            return self.root.value == 0
        return self.root == 0

    def weight_at(self, progress: float) -> float:
        """Return the weight after `progress`, a share of the run; outside [0, 1] the ends hold."""
        if isinstance(self.root, WindowWeight):
            window, progress = self.root, min(max(progress, 0.0), 1.0)
            is_inside = window.from_ <= progress < window.to or progress == window.to == 1.0
            return window.value if is_inside else 0.0
        line = self.root
        if not isinstance(line, LinearWeight):
            return line
        share = min(max(progress / line.until, 0.0), 1.0)
        # Not start + share * (end - start): that misses `end` by a rounding step at share 1.
        return (1.0 - share) * line.start + share * line.end
