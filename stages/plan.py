"""plan: what a capture would take in bytes, time and memory, before anything of it is paid."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from rich.console import Console

from stages.command import params_option, stage
from stages.parameters import forget_sections
from stages.planning.budget import Budget
from stages.planning.capture import PlannedCapture
from stages.planning.project import Project
from stages.planning.sizes import parse_size
from stages.planning.table import show


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
    project = Project.read(params, teacher)
    with TemporaryDirectory() as scratch:
        planned = PlannedCapture(project, project.count(Path(scratch)))
        if probe:
            planned.probe = planned.run_probe()
        found = planned.describe()
        if limit is not None:
            found["budget"] = Budget(planned).describe(limit)
    if is_json:
        click.echo(json.dumps(found, indent=2))
    else:
        show(Console(highlight=False), found)
    forget_sections()  # nothing is recorded, so an edit meanwhile does no harm


if __name__ == "__main__":
    plan()
