"""Section `students.S`: all that makes one student."""

from typing import Annotated

from pydantic import Field

from pipeline.section import Section
from pipeline.student.align.objective import Alignment, Objective
from pipeline.student.model.origin import StudentModel
from pipeline.training.options import TrainOptions


class StudentParams(Section):
    """Section `students.S`, all of it."""

    teacher: str
    model: StudentModel
    align: Alignment = Alignment()
    loss: Objective = Objective()
    train: TrainOptions = Field(default_factory=TrainOptions)
    pool_segments: Annotated[int, Field(ge=1)] = 4
    gradient_norms: bool = False
    parts: Annotated[int, Field(ge=1)] | None = None
