"""What every command shares: one line on stderr, the error's exit code, no traceback."""

import errno
import logging
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner
from tqdm import tqdm

from pipeline.errors import (
    ConfigError,
    IncompatibleError,
    IntegrityError,
    Interrupted,
    ResourceError,
)
from stages.command import INTERRUPTED, resource_error, resumable, stage
from tests.cases import ROOT, error_line


def failing(error: BaseException) -> click.Command:
    @click.command()
    @stage
    def command() -> None:
        raise error

    return command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("a"), 2),
        (IntegrityError("a"), 3),
        (IncompatibleError("a"), 4),
        (ResourceError("a"), 5),
        (OSError(errno.ENOSPC, "No space left on device", "data/x"), 5),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "data/x"), 5),
        (PermissionError(errno.EACCES, "Permission denied", "data/x"), 5),
        (RuntimeError("Error while serializing: No space left on device (os error 28)"), 5),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), 5),
        (MemoryError(), 5),
    ],
)
def test_an_error_is_one_line_and_its_exit_code(error, code):
    result = CliRunner().invoke(failing(error))
    assert result.exit_code == code
    assert error_line(result)


def test_of_what_bitsandbytes_warns_one_line_alone_is_kept_back(caplog):
    CliRunner().invoke(failing(ConfigError("a")))
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "x")
    logger.warning("another")
    assert caplog.messages == ["another"]


def test_who_lacks_memory_is_told_what_to_lower():
    said = str(resource_error(MemoryError()))
    assert "lower batch_size or batch_tokens, or set micro_batch_size in runtime.yaml" in said


def test_a_message_of_several_lines_becomes_one():
    result = CliRunner().invoke(failing(ConfigError("first\n  second")))
    assert error_line(result) == "error: first second"


@pytest.mark.parametrize("error", [ConfigError("a"), KeyboardInterrupt()])
def test_an_error_does_not_stand_behind_a_progress_bar(error):
    @click.command()
    @stage
    def command() -> None:
        bar = tqdm(range(3))
        bar.update()
        raise error

    lines = CliRunner().invoke(command).stderr.splitlines()
    assert lines[-1].startswith(("error: a", "interrupted;"))


def test_what_was_not_foreseen_keeps_its_traceback():
    error = RuntimeError("a bug")
    assert resource_error(error) is None
    result = CliRunner().invoke(failing(error))
    assert result.exception is error


def test_an_interrupted_command_promises_nothing_that_it_does_not_keep():
    result = CliRunner().invoke(failing(KeyboardInterrupt()))
    assert result.exit_code == INTERRUPTED
    assert result.stderr == "interrupted; the same command starts from the beginning\n"


def test_an_interrupted_command_says_what_it_keeps():
    @click.command()
    @resumable("keeps every finished part")
    def command() -> None:
        raise KeyboardInterrupt

    result = CliRunner().invoke(command)
    assert result.stderr == "interrupted; the same command keeps every finished part\n"


def test_who_saved_its_state_says_where_and_ends_by_the_signals_code():
    result = CliRunner().invoke(failing(Interrupted("goes on from step 3", 143)))
    assert result.exit_code == 143
    assert result.stderr == "interrupted; the same command goes on from step 3\n"


def test_a_store_that_is_whole_is_recognised_without_torch(project):
    """Runs in a process of its own, for this one has imported torch long ago."""
    code = (
        "import sys; from stages.capture import capture\n"
        "capture(['main'], standalone_mode=False)\n"
        "sys.exit(bool({'torch', 'transformers', 'dask'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "is complete: 4 signals" in result.stderr
