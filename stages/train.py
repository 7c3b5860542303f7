"""train@S: student S learns from the store alone."""

from pathlib import Path

import click

from pipeline.errors import ConfigError
from pipeline.provenance import read_json
from stages.command import params_option, stage
from stages.parameters import section
from stages.project import DATA, prepare_torch, runtime, stores, work
from stages.sections.student import StudentParams


@click.command()
@click.argument("student", required=False)
@click.option("--student", "named", metavar="NAME", help="The same as the argument.")
@params_option
@stage
def train(student: str | None, named: str | None, params: Path) -> None:
    """Train STUDENT from the store into data/students/STUDENT. The teacher is not loaded.

    \b
    Example:
      decant train aligned
    """
    if (student is None) == (named is None):
        raise ConfigError("train: expected one student; give STUDENT, or --student NAME")
    student = str(student or named)

    options = section(params, f"students.{student}", StudentParams)
    from pipeline.student.train import train_student

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
        revision=options.model.revision,
        vocabulary=options.model.vocabulary,
        lora=options.model.lora,
        parts=options.parts,
    )


if __name__ == "__main__":
    train()
