"""How much a term of the loss counts as the run goes on: a constant, or a straight line."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, RootModel

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


class Weight(RootModel[NonNegative | LinearWeight]):
    """A term's weight in `params.yaml`: a number, or `{start, end, until}`."""

    model_config = ConfigDict(frozen=True)

    @property
    def is_off(self) -> bool:
        """Whether the weight is 0 in the whole run; the term then needs no signal and no column."""
        if isinstance(self.root, LinearWeight):
            return self.root.start == 0 and self.root.end == 0
        return self.root == 0

    def weight_at(self, progress: float) -> float:
        """Return the weight after `progress`, a share of the run; outside [0, 1] the ends hold."""
        line = self.root
        if not isinstance(line, LinearWeight):
            return line
        share = min(max(progress / line.until, 0.0), 1.0)
        # Not start + share * (end - start): that misses `end` by a rounding step at share 1.
        return (1.0 - share) * line.start + share * line.end
