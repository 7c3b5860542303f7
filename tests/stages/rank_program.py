"""What one of several processes does in the tests of who starts them: as its argument says."""

import os
import signal
import sys
import time

import click


def main(what: str) -> None:
    rank = int(os.environ["RANK"])
    if what == "environment" and rank == 1:
        names = ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "OMP_NUM_THREADS")
        click.echo(" ".join(os.environ[name] for name in names), err=True)
        sys.exit(9)
    elif what == "both refuse":
        click.echo(f"error: refused by {rank}", err=True)
        sys.exit(4)
    elif what == "the second refuses" and rank == 1:
        click.echo("a line of the log\nerror: refused by 1", err=True)
        sys.exit(3)
    elif what == "the second refuses":
        sys.exit(75)
    elif what == "the second is killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    elif what == "the second is killed":
        time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1])
