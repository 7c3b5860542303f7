"""Section `evaluate`: by which score models are judged, and how it is measured."""

from typing import Annotated

from pydantic import Field, field_validator

from pipeline.evaluate.options import GenerateOptions, IntervalOptions
from pipeline.evaluate.scores import GLUE, SCORES
from stages.parameters import Section


class EvaluateParams(Section):
    """Section `evaluate`; `score` is one of the task's, or a GLUE task's name."""

    score: str | None = None
    generate: GenerateOptions = GenerateOptions()
    intervals: IntervalOptions = IntervalOptions()
    samples: Annotated[int, Field(ge=0)] = 8

    @field_validator("score")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        if value is not None and value not in SCORES and value not in GLUE:
            known = ", ".join([*SCORES, *GLUE])
            raise ValueError(f"found {value!r}, expected a score or a GLUE task: {known}")
        return value
