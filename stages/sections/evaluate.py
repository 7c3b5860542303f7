"""Section `evaluate`: by which score models are judged, and how it is measured."""

from typing import Annotated

from pydantic import Field, field_validator

from pipeline.errors import ConfigError
from pipeline.evaluate.options import GenerateOptions, IntervalOptions
from pipeline.scores.registry import known_names
from pipeline.scores.tokenization import AUTO, check_tokenizer
from stages.parameters import Section


class EvaluateParams(Section):
    """Section `evaluate`.

    `score` is one of the task's, or a GLUE task's name; `tokenizer` is sacrebleu's, for BLEU.
    Without `timing` no forward pass is timed.
    """

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
