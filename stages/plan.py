"""plan: the bytes, memory and time that a capture would take."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
from rich.console import Console

from pipeline.corpus.text.parameters import CorpusParams
from pipeline.planning.budget import Budget
from pipeline.planning.planned_capture import PlannedCapture
from pipeline.planning.project import Project
from pipeline.planning.sizes import parse_size
from pipeline.student.parameters import StudentParams
from pipeline.teacher.parameters.capture import CaptureParams
from pipeline.teacher.parameters.model import TeacherModel
from pipeline.teacher.parameters.tokens import TokenParams
from stages.command import params_option, stage
from stages.parameters import forget_sections, section
from stages.plan_table import show
from stages.project import DATA, prepare_torch, runtime, stores


@click.command()
@click.argument("teacher")
@click.option("--probe", is_flag=True, help="Load the teacher and measure a few batches.")
@click.option("--budget", metavar="SIZE", help="Show which choices fit in SIZE, such as 200GB.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON instead of tables.")
@params_option
@stage
def plan(teacher: str, params: Path, probe: bool, budget: str | None, is_json: bool) -> None:
    """Estimate what capturing TEACHER takes.

    The estimate needs the configuration alone; no stage has to have run. With --probe the teacher
    is loaded and captures a few batches, which are not written. If a complete store already exists,
    its actual size is shown next to the estimate. With --budget a table compares other forms and
    fewer layers: their size, whether they fit, and the students that they exclude.

    \b
    Example:
      decant plan main
      decant plan main --probe
      decant plan main --budget 200GB
    """
    limit = None if budget is None else parse_size(budget, key="--budget")
    project = _project(params, teacher)
    project.check_layers()
    with TemporaryDirectory() as scratch:
        planned = PlannedCapture(project, project.count(Path(scratch)))
        if probe:
            from pipeline.teacher.source.placement import Placement

            machine = runtime()
            planned.probe = planned.run_probe(prepare_torch(machine), Placement.of(machine))
        estimate = planned.describe()
        if limit is not None:
            estimate["budget"] = Budget(planned).describe(limit)
    if is_json:
        click.echo(json.dumps(estimate, indent=2))
    else:
        show(Console(highlight=False), estimate)
    forget_sections()  # nothing is recorded, so an edit of params.yaml does no harm


def _project(params: Path, teacher: str) -> Project:
    """Read the sections that concern one teacher."""
    key = f"teachers.{teacher}"
    students = section(params, "students", dict[str, StudentParams])
    return Project(
        name=teacher,
        corpus=section(params, "corpus", CorpusParams),
        model=section(params, f"{key}.model", TeacherModel),
        is_fit=section(params, key, dict[str, Any]).get("fit") is not None,
        tokens=section(params, f"{key}.tokens", TokenParams),
        capture=section(params, f"{key}.capture", CaptureParams),
        students={name: own for name, own in students.items() if own.teacher == teacher},
        data=DATA,
        stores=stores(),
    )


if __name__ == "__main__":
    plan()
