"""select@S: the digests of just the signals student S uses; no other can re-run it.

What it trains from and what it is compared with are two files: logits captured in another form
re-run its evaluation, not its training.
"""

from pathlib import Path
from typing import Any

import click
from pydantic import ConfigDict

from pipeline.evaluate.reference import reference_logits
from pipeline.provenance import write_json
from pipeline.section import Section
from pipeline.student.align.needs import select_signals
from pipeline.student.align.objective import Alignment, Objective
from pipeline.student.model.origin import StudentModel
from stages.command import params_option, stage
from stages.parameters import section
from stages.project import DATA


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
    """Record the digests of the signals STUDENT needs.

    They go to data/selected/STUDENT.json. STUDENT.agreement.json names the teacher's logits that
    evaluation compares with.

    \b
    Example:
      decant select aligned
    """
    options: Any = section(params, f"students.{student}", SelectParams)
    manifests = DATA / "manifests" / options.teacher
    selected = select_signals(
        manifests,
        name=student,
        objective=options.loss,
        align=options.align,
        model=options.model,
    )
    write_json(DATA / "selected" / f"{student}.json", selected)
    write_json(DATA / "selected" / f"{student}.agreement.json", reference_logits(manifests))


if __name__ == "__main__":
    select()
