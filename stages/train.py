"""train@S: student S learns from the store alone."""

from pathlib import Path
from typing import Annotated

import click
from pydantic import Field

from pipeline.provenance import read_json
from pipeline.student.objective import Alignment, Objective
from pipeline.student.origin import StudentModel
from pipeline.training.options import TrainOptions
from stages.command import params_option, stage
from stages.project import DATA, Section, prepare_torch, runtime, section, stores, work


class StudentParams(Section):
    """Section `students.S`, all of it."""

    teacher: str
    model: StudentModel
    align: Alignment = Alignment()
    loss: Objective = Objective()
    train: TrainOptions = Field(default_factory=TrainOptions)
    pool_segments: Annotated[int, Field(ge=1)] = 4
    gradient_norms: bool = False


@click.command()
@click.argument("student")
@params_option
@stage
def train(student: str, params: Path) -> None:
    """Train STUDENT from the store into data/students/STUDENT. The teacher is not loaded.

    \b
    Example:
      decant train aligned
    """
    from pipeline.student.train import train_student

    options = section(params, f"students.{student}", StudentParams)
    train_student(
        name=student,
        selected=read_json(DATA / "selected" / f"{student}.json"),
        stores=stores(),
        output=DATA / "students" / student,
        curve=DATA / "metrics" / "curves" / f"{student}.csv",
        work=work(),
        architecture=options.model.architecture,
        checkpoint=options.model.checkpoint,
        init=options.model.init,
        objective=options.loss,
        options=options.train,
        pool_segments=options.pool_segments,
        gradient_norms=options.gradient_norms,
        device=prepare_torch(runtime()),
    )


if __name__ == "__main__":
    train()
