"""The options of evaluation, as in `params.yaml`."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from pipeline.errors import ConfigError
from pipeline.scores.registry import known_names
from pipeline.scores.tokenization import AUTO, check_tokenizer
from pipeline.section import Positive, Section

Count = Annotated[int, Field(ge=0)]


class GenerateOptions(Section):
    """How text is generated for scores: greedily or by beam search, so it is reproducible.

    Attributes:
        rows: Number of test rows, drawn once for all models; 0 generates nothing.
        max_new_tokens: Most tokens after a prompt.
        num_beams: Beams of the search; 1 is greedy.
        batch_size: Prompts that run together.
    """

    rows: Count = 200
    max_new_tokens: Positive = 64
    num_beams: Positive = 1
    batch_size: Positive = 16


class IntervalOptions(Section):
    """How intervals are computed; the same seed gives the same numbers.

    Attributes:
        resamples: How often rows are drawn anew, and how often a paired test swaps them.
        confidence: Share of the resamples' scores that an interval holds.
    """

    resamples: Positive = 1000
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    seed: Count = 0


class EvaluateParams(Section):
    """Section `evaluate`.

    `dtype` is what the weights of teachers and students are loaded in. `score` is one of the
    task's, or a GLUE task's name; `tokenizer` is sacrebleu's, for BLEU.
    Without `timing` no forward pass is timed.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    score: str | None = None
    generate: GenerateOptions = GenerateOptions()
    intervals: IntervalOptions = IntervalOptions()
    tokenizer: str = AUTO
    timing: bool = True
    samples: Annotated[int, Field(ge=0)] = 8

    @field_validator("score")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        if value is not None and value not in known_names():
            known = ", ".join(known_names())
            raise ValueError(f"found {value!r}, expected a score or a GLUE task: {known}")
        return value

    @field_validator("tokenizer")
    @classmethod
    def _works_here(cls, value: str) -> str:
        try:
            return check_tokenizer(value)
        except ConfigError as error:
            raise ValueError(str(error).removeprefix("evaluate.tokenizer: ")) from error
