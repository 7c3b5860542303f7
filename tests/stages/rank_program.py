"""What one of several processes does in the tests of who starts them: as its argument says."""

import os
import signal
import sys
import time
from pathlib import Path

import click


def save_when_interrupted(rank: int) -> None:
    """Take as long as the first process needs to save, then end as an interrupted training."""
    told: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: told.append(number))
    ready = Path(os.environ["READY"])
    (ready / str(rank)).touch()
    if rank == 0:
        while len(list(ready.iterdir())) < 2:
            time.sleep(0.01)
        os.kill(os.getppid(), signal.SIGTERM)
    while not told:
        time.sleep(0.01)
    time.sleep(0.3)
    click.echo(f"saved {rank} {len(told)}", err=True)
    sys.exit(128 + told[0])


def main(what: str) -> None:
    rank = int(os.environ["RANK"])
    if what == "environment" and rank == 1:
        names = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS")
        click.echo(" ".join(os.environ[name] for name in names), err=True)
        sys.exit(9)
    elif what == "both refuse":
        click.echo(f"error: refused by {rank}", err=True)
        sys.exit(4)
    elif what == "both are lost":
        click.echo(f"error: lost by {rank}" if rank else "", err=True, nl=bool(rank))
        sys.exit(75)
    elif what.startswith("the second refuses") and rank == 1:
        click.echo("a line of the log\nerror: refused by 1", err=True)
        sys.exit(3)
    elif what == "the second refuses":
        sys.exit(75)
    elif what == "the second refuses, the first is aborted":
        # As NCCL's watchdog does.
        os.kill(os.getpid(), signal.SIGABRT)
    elif what == "the second is killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "all save when interrupted":
        save_when_interrupted(rank)
    elif what == "the second is killed":
        time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1])
