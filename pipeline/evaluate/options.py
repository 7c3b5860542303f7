"""The options of evaluation, as in `params.yaml`."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]


class GenerateOptions(BaseModel):
    """How text is generated for scores: greedily or by beam search, so it is reproducible.

    Attributes:
        rows: Number of test rows, drawn once for all models; 0 generates nothing.
        max_new_tokens: Most tokens after a prompt.
        num_beams: Beams of the search; 1 is greedy.
        batch_size: Prompts that run together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rows: Count = 200
    max_new_tokens: Positive = 64
    num_beams: Positive = 1
    batch_size: Positive = 16


class IntervalOptions(BaseModel):
    """How intervals are computed; the same seed gives the same numbers.

    Attributes:
        resamples: How often rows are drawn anew, and how often a paired test swaps them.
        confidence: Share of the resamples' scores that an interval holds.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    resamples: Positive = 1000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: Count = 0
