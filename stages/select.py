"""select@S: the digests of the signals that student S uses; changes of others do not re-run it.

The signals for training and those for the comparison with the teacher are two files, so capturing
logits in another form re-runs the student's evaluation but not its training.
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
    """The keys of section `students.S` that select reads; it ignores those of training."""

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
