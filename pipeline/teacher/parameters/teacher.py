"""Section `teachers.T`, all of it."""

from pydantic import model_validator

from pipeline.section import Section
from pipeline.teacher.parameters.capture import CaptureParams
from pipeline.teacher.parameters.model import TeacherModel
from pipeline.teacher.parameters.tokens import TokenParams
from pipeline.training.options import TrainOptions


class TeacherParams(Section):
    """Section `teachers.T`. `fit: null` leaves a pretrained teacher's weights as they are."""

    tokens: TokenParams
    model: TeacherModel
    fit: TrainOptions | None = None
    capture: CaptureParams

    # After, not before: what a function has seen is no JSON any more, whose lists may be tuples.
    @model_validator(mode="after")
    def _says_how_it_learns(self) -> "TeacherParams":
        if "fit" not in self.model_fields_set:
            raise ValueError(
                "fit is missing; say how to train the teacher, or `fit: null` to leave its weights "
                "as they are"
            )
        return self
