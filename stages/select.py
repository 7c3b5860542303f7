"""select@S: the digests of just the signals student S uses; no other can re-run it."""

from pathlib import Path
from typing import Any

import click
from pydantic import ConfigDict

from pipeline.provenance import write_json
from pipeline.student.needs import select_signals
from pipeline.student.objective import Alignment, Objective
from pipeline.student.origin import StudentModel
from stages.command import params_option, stage
from stages.project import DATA, Section, section


class SelectParams(Section):
    """What select reads of section `students.S`; how it is optimised is not its business."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    teacher: str
    model: StudentModel
    align: Alignment = Alignment()
    loss: Objective = Objective()


@click.command()
@click.argument("student")
@params_option
@stage
def select(student: str, params: Path) -> None:
    """Write data/selected/STUDENT.json: the signals STUDENT needs, with their digests.

    \b
    Example:
      decant select aligned
    """
    options: Any = section(params, f"students.{student}", SelectParams)
    selected = select_signals(
        DATA / "manifests" / options.teacher,
        name=student,
        objective=options.loss,
        align=options.align,
        architecture=options.model.architecture,
        checkpoint=options.model.checkpoint,
        init=options.model.init,
        blocks=options.model.blocks,
    )
    write_json(DATA / "selected" / f"{student}.json", selected)


if __name__ == "__main__":
    select()
