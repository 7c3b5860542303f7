"""train@S: student S learns from the store alone."""

from pathlib import Path

import click

from pipeline.provenance import read_json
from stages.command import params_option, stage
from stages.parameters import section
from stages.project import DATA, prepare_torch, runtime, stores, work
from stages.sections.student import StudentParams


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
