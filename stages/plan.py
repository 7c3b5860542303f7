"""plan: what a capture would take in bytes, time and memory, before anything of it is paid."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from rich.console import Console

from pipeline.errors import ConfigError
from stages.command import params_option, stage
from stages.parameters import forget_sections
from stages.planning.budget import Budget
from stages.planning.capture import PlannedCapture
from stages.planning.parameters import write_capture
from stages.planning.project import Project
from stages.planning.sizes import parse_size
from stages.planning.table import show


@click.command()
@click.argument("teacher")
@click.option("--probe", is_flag=True, help="Load the teacher and measure a few batches.")
@click.option("--budget", metavar="SIZE", help="Say what of it to capture in SIZE, as 200GB.")
@click.option("--apply", "is_applied", is_flag=True, help="With --budget: write it to the params.")
@click.option("--json", "is_json", is_flag=True, help="Print JSON instead of tables.")
@params_option
@stage
def plan(
    teacher: str, params: Path, probe: bool, budget: str | None, is_applied: bool, is_json: bool
) -> None:
    """Say what capturing TEACHER takes: tokens, bytes by signal, memory, time, and when it pays.

    From the configuration alone; nothing needs to have run. With --probe the teacher is loaded and
    a few batches are captured without being written. Beside a store that is whole already stands
    what it took.

    \b
    Example:
      decant plan main
      decant plan main --probe
      decant plan main --budget 200GB --apply
    """
    if is_applied and budget is None:
        raise ConfigError("--apply: writes what --budget chooses; give --budget SIZE too")
    limit = None if budget is None else parse_size(budget, key="--budget")
    project = Project.read(params, teacher)
    with TemporaryDirectory() as scratch:
        planned = PlannedCapture(project, project.count(Path(scratch)))
        if probe:
            planned.probe = planned.run_probe()
        found = planned.describe()
        if limit is not None:
            chooser = Budget(planned)
            choice, broken = chooser.choose(limit)
            if is_applied:
                write_capture(params, teacher, choice.rungs, seen=project.seen)
                forget_sections()  # the change is this command's own
            found["budget"] = chooser.describe(choice, broken, limit, is_applied)
    if is_json:
        click.echo(json.dumps(found, indent=2))
    else:
        show(Console(highlight=False), found)
    # Nothing is recorded, and --apply has edited the file itself.
    forget_sections()


if __name__ == "__main__":
    plan()
