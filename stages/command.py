"""Shared by all commands: logging to stderr, one-line errors, exit codes."""

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
"""The beginning of a warning that users need not see: when peft imports bitsandbytes, it says that
the hub has a faster product for four-bit weights on a CPU."""

CAPTURE = "decant capture TEACHER"
"""The advice in errors of a store."""

NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS)

params_option = click.option(
    "--params",
    type=click.Path(path_type=Path, dir_okay=False),
    default=Path("params.yaml"),
    show_default=True,
    help="The project's parameters.",
)


class _AboveBars(logging.StreamHandler[TextIO]):
    """Writes log lines to stderr above open progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(visible(self.format(record)), file=sys.stderr)
        sys.stderr.flush()


def resumable(keeps: str) -> Callable[[Stage[Arguments]], Stage[Arguments]]:
    """Return `stage` for a command that keeps work when it is interrupted.

    Args:
        keeps: What repeating the command does, continuing the sentence "the same command ...".
    """
    return functools.partial(stage, keeps=keeps)


def stage(run: Stage[Arguments], *, keeps: str = STARTS_OVER) -> Stage[Arguments]:
    """Turn the library's errors into one line on stderr and their exit code.

    A command succeeds only if the parameters that it read have not been edited meanwhile.

    Args:
        run: The command's function.
        keeps: What repeating the command after an interrupt does, continuing the sentence "the same
            command ...".
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
            # Not only OSError: torch and safetensors raise their own classes for a full disk.
            resource = resource_error(error)
            if resource is None:
                raise
            _fail(resource)

    return wrapped


def _log_level() -> int:
    """Return the log level that `DECANT_LOG` names in either case; INFO if it is not set."""
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
    """Return an error about disk or memory for a library's own; None if it has another cause."""
    text = " ".join(str(error).split())
    number = error.errno if isinstance(error, OSError) else None
    path = getattr(error, "filename", None) or "data"
    if is_no_room(error):
        return ResourceError(
            f"{path}: cannot be written ({text}: {free_bytes(Path(path))} bytes free); free "
            "space, then run the same command again: what was written stays valid"
        )
    if number in NO_ACCESS:
        return ResourceError(
            f"{path}: no access ({text}); correct its permissions, then run the same command again"
        )
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return ResourceError(
            f"out of memory ({text or 'no details'}); lower batch_size or batch_tokens, or set "
            "micro_batch_size in runtime.yaml for a training, then run the same command again"
        )
    return None


def _fail(error: DecantError, teacher: object = None) -> None:
    _end_progress()
    for cause in error.errors if isinstance(error, ManyFoundError) else (error,):
        message = " ".join(str(cause).split())
        if CAPTURE in message:
            # A store does not know the name of its teacher.
            name = teacher if isinstance(teacher, str) else teacher_of(message)
            message = message.replace(CAPTURE, f"decant capture {name}")
        click.echo(f"error: {visible(message)}", err=True)
    sys.exit(error.exit_code)


def _end_progress() -> None:
    """End the line of a progress bar, so that the next message starts on a line of its own."""
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
