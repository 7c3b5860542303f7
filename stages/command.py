"""What every stage's command shares: logging to stderr, one-line errors, exit codes."""

import errno
import functools
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import ParamSpec, TextIO

import click
from tqdm import tqdm

from pipeline.errors import ConfigError, DecantError, Interrupted, ManyFoundError, ResourceError
from pipeline.provenance import free_bytes, is_no_room
from pipeline.visible import visible
from stages.parameters import check_unchanged, forget_sections
from stages.project import teacher_of

Arguments = ParamSpec("Arguments")
Stage = Callable[Arguments, None]
INTERRUPTED = 130
STARTS_OVER = "starts from the beginning"

KERNELS = "Failed to load CPU gemm_4bit_forward from kernels-community"
"""What bitsandbytes warns of when peft imports it: the hub has a faster product for weights of four
bits on a CPU."""

CAPTURE = "decant capture TEACHER"
"""What errors of a store advise."""

NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)

params_option = click.option(
    "--params",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("params.yaml"),
    show_default=True,
    help="The project's parameters.",
)


class _AboveBars(logging.StreamHandler[TextIO]):
    """Writes lines to stderr above progress bars that are open."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(visible(self.format(record)), file=sys.stderr)
        sys.stderr.flush()


def resumable(keeps: str) -> Callable[[Stage[Arguments]], Stage[Arguments]]:
    """Return `stage` for a command that keeps work when it is interrupted.

    Args:
        keeps: What the same command does then, to follow "the same command".
    """
    return functools.partial(stage, keeps=keeps)


def stage(run: Stage[Arguments], *, keeps: str = STARTS_OVER) -> Stage[Arguments]:
    """Turn the library's errors into one line on stderr and their exit code.

    A command ends well only if the parameters that it read are still those in the file.

    Args:
        run: The command's function.
        keeps: What the same command does after an interrupt, to follow "the same command".
    """

    @functools.wraps(run)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        logging.basicConfig(format="%(message)s", handlers=[_AboveBars()])
        for noisy in ("httpx", "datasets", "distributed", "fontTools", "matplotlib"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        logging.getLogger("bitsandbytes.backends.cpu.ops").addFilter(_is_news)
        forget_sections()
        try:
            logging.getLogger().setLevel(_log_level())
            run(*args, **kwargs)
            check_unchanged()
        except DecantError as error:
            _fail(error, kwargs.get("teacher"))
        except KeyboardInterrupt as error:
            saved = error if isinstance(error, Interrupted) else Interrupted(keeps, INTERRUPTED)
            _end_progress()
            click.echo(str(saved), err=True)
            sys.exit(saved.exit_code)
        except Exception as error:
            # Not only OSError: torch and safetensors have classes of their own for a full disk.
            resource = resource_error(error)
            if resource is None:
                raise
            _fail(resource)

    return wrapped


def _log_level() -> int:
    """Return the level that `DECANT_LOG` names, in capitals or not; INFO if it names none."""
    levels = logging.getLevelNamesMapping()
    name = os.environ.get("DECANT_LOG") or "INFO"
    if name.upper() not in levels:
        raise ConfigError(
            f"DECANT_LOG: found {name!r}, expected one of {', '.join(levels)}; correct it"
        )
    return levels[name.upper()]


def _is_news(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(KERNELS)


def resource_error(error: BaseException) -> ResourceError | None:
    """Return what a library's error says of disk or memory; None if it is about something else."""
    text = " ".join(str(error).split())
    number = error.errno if isinstance(error, OSError) else None
    place = getattr(error, "filename", None) or "data"
    if is_no_room(error):
        return ResourceError(
            f"{place}: cannot be written ({text}: {free_bytes(Path(place))} bytes free); free "
            "space, then run the same command again: what was written stays valid"
        )
    if number in NO_ACCESS:
        return ResourceError(
            f"{place}: no access ({text}); correct its permissions, then run the same command again"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ResourceError(
            f"out of memory ({text or 'no more said'}); lower batch_size or batch_tokens, or set "
            "micro_batch_size in runtime.yaml for a training, then run the same command again"
        )
    return None


def _fail(error: DecantError, teacher: object = None) -> None:
    _end_progress()
    for cause in error.errors if isinstance(error, ManyFoundError) else (error,):
        message = " ".join(str(cause).split())
        if CAPTURE in message:
            # Stores do not know the names of teachers.
            name = teacher if isinstance(teacher, str) else teacher_of(message)
            message = message.replace(CAPTURE, f"decant capture {name}")
        click.echo(f"error: {visible(message)}", err=True)
    sys.exit(error.exit_code)


def _end_progress() -> None:
    """End the line of a progress bar; what is said next would stand behind it otherwise."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
