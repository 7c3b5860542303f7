"""What every stage's command shares: logging to stderr, one-line errors, exit codes."""

import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec

import click

from pipeline.errors import DecantError

Arguments = ParamSpec("Arguments")
INTERRUPTED = 130

params_option = click.option(
    "--params",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("params.yaml"),
    show_default=True,
    help="The project's parameters.",
)


def stage(run: Callable[Arguments, None]) -> Callable[Arguments, None]:
    """Turn the library's errors into one line on stderr and their exit code."""

    @functools.wraps(run)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        logging.basicConfig(
            level=os.environ.get("DECANT_LOG", "INFO"), format="%(message)s", stream=sys.stderr
        )
        for noisy in ("httpx", "datasets", "distributed", "fontTools", "matplotlib"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        try:
            run(*args, **kwargs)
        except DecantError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted; the same command goes on where this one was", err=True)
            sys.exit(INTERRUPTED)

    return wrapped
