"""`make families`: every family through its life, and the page of them.

A family may take three minutes and ten gigabytes.
"""

import json
import logging
import os
import resource
import signal as signals
import tempfile
import warnings
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click
import torch
import transformers

from tests.captured import Captured
from tests.families.configs import TASKS, families
from tests.families.lifecycle import Life, as_row, foreign_teacher, live
from tests.families.page import write_page

SECONDS, BYTES = 180, 10 * 2**30


@cache
def teacher(task: str) -> Captured:
    """Return the teacher of students of other families, captured once a process."""
    return foreign_teacher(task, Path(tempfile.mkdtemp(prefix="families-")))


def run_one(job: tuple[str, str]) -> dict[str, Any]:
    """Return what became of a family and a task."""
    family, task = job
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)

    def late(*_: Any) -> None:
        raise TimeoutError(f"not done after {SECONDS} s")

    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    signals.signal(signals.SIGALRM, late)
    signals.alarm(SECONDS)
    try:
        with tempfile.TemporaryDirectory() as root:
            return as_row(live(family, task, Path(root), teacher))
    except Exception as error:  # noqa: BLE001 - a row of the table, whatever it is
        return as_row(Life(family, task, broken=[f"{type(error).__name__}: {str(error)[:200]}"]))
    finally:
        signals.alarm(0)


@click.command()
@click.argument("names", nargs=-1)
@click.option("--processes", default=2)
@click.option("--page", is_flag=True, help="Write docs/families.md; only for all families.")
def main(names: tuple[str, ...], processes: int, page: bool) -> None:
    """Take the families NAMES, or all, through their life; exit with 1 if a promise broke."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "OMP_NUM_THREADS": "1"}
    jobs = [
        (family, task)
        for task in TASKS
        for family in families(task)
        if not names or family in names
    ]
    rows: list[dict[str, Any]] = []
    with get_context("forkserver").Pool(processes, maxtasksperchild=20) as pool:
        for row in pool.imap(run_one, jobs):
            rows.append(row)
            click.echo(json.dumps(row))
    if page and not names:
        write_page(rows, transformers.__version__)
    broken = [row for row in rows if row["broken"]]
    click.echo(f"{len(rows)} families and tasks, {len(broken)} broken", err=True)
    raise SystemExit(bool(broken))


if __name__ == "__main__":
    main()
