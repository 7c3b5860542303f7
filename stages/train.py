"""train@S: student S learns from the store alone, or several students from one read of it."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from pipeline.errors import ConfigError, in_short
from pipeline.provenance import read_json
from pipeline.runtime import Runtime
from pipeline.student.parameters import StudentParams
from stages.command import params_option, resumable
from stages.parameters import check_unchanged, section
from stages.project import DATA, on_one_gpu, prepare_torch, runtime, stores, work
from stages.ranks import KEEPS, LOST_CODE, check_gpus, is_first, is_lost_peer, is_rank, run_ranks

if TYPE_CHECKING:
    from pipeline.student.loop.training import Training


@click.command()
@click.argument("student", required=False)
@click.option("--student", "named", metavar="NAME", help="The same as the argument.")
@click.option(
    "--students",
    metavar="NAMES",
    help="Several students of one store, separated by commas; the store is read once.",
)
@params_option
@resumable(KEEPS)
def train(student: str | None, named: str | None, students: str | None, params: Path) -> None:
    """Train STUDENT from the store, without its teacher.

    The model goes to data/students/STUDENT. With --students, the store is read once and all
    students train in one process, with exactly the results of separate runs; all are in memory at
    once. DVC does not see such a run: record it with `dvc commit -f train@A train@B`.

    \b
    Example:
      decant train aligned
      decant train --students small,aligned,soft
    """
    names = _names(student, named, students)
    options = {name: section(params, f"students.{name}", StudentParams) for name in names}
    settings = runtime()
    if len(names) > 1 and settings.processes > 1:
        raise ConfigError(
            f"runtime processes: found {settings.processes}, expected 1 for --students, which take "
            "turns in one process; set it to 1, or train one student at a time"
        )
    if settings.processes > 1 and not is_rank():
        arguments = [names[0], "--params", str(params)]
        code = run_ranks(
            "stages.train", arguments, processes=settings.processes, threads=settings.threads
        )
        if code:
            sys.exit(code)
        return
    if not is_first():
        logging.getLogger().setLevel(logging.WARNING)
    check_gpus(settings.device)
    settings = on_one_gpu(settings)
    prepare_torch(settings)
    try:
        _train([_training(name, options[name], settings) for name in names])
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        if not is_first():
            # Shown only if no process has another reason.
            click.echo(
                f"error: students.{names[0]}: lost another process ({in_short(error)}); run the "
                f"same command again: it {KEEPS}",
                err=True,
            )
        sys.exit(LOST_CODE)


def _names(student: str | None, named: str | None, students: str | None) -> list[str]:
    """Return the names of the students to train.

    Raises:
        ConfigError: If there is none, one is named twice, or two options name students.
    """
    given = [way for way in (student, named, students) if way is not None]
    if len(given) != 1:
        raise ConfigError(
            "train: expected one student, or several of one store; give STUDENT, or --student "
            "NAME, or --students NAME,NAME"
        )
    if students is None:
        return given
    names = [name.strip() for name in students.split(",")]
    if "" in names or len(set(names)) < len(names):
        raise ConfigError(
            f"--students: found {students!r}, expected each name once, with commas between them; "
            "correct it"
        )
    return names


def _training(name: str, options: StudentParams, settings: Runtime) -> "Training":
    from pipeline.student.loop.training import Training

    return Training(
        name=name,
        selected=read_json(DATA / "selected" / f"{name}.json"),
        stores=stores(),
        output=DATA / "students" / name,
        curve=DATA / "metrics" / "curves" / f"{name}.csv",
        work=work(),
        student=options,
        runtime=settings,
        before_commit=check_unchanged,
    )


def _train(trainings: "Sequence[Training]") -> None:
    if len(trainings) > 1:
        from pipeline.student.loop.together import train_together

        train_together(trainings)
        return
    from pipeline.student.loop.train import train_student

    train_student(trainings[0])


if __name__ == "__main__":
    train()
