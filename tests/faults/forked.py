"""Processes to kill: forks of this one, which has imported torch already, so each costs a blink.

What a test has patched is patched in the child too; what the child does to itself stays there.
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from pipeline.student.loop import train as student
from pipeline.teacher.capture import capture as teacher
from stages import capture, select, train
from stages.cli import main

LOADED = (capture, select, train, student, teacher)
"""What a child would otherwise import anew, each time."""
NEVER = 10**9
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT
"""Of Python's audit events those that change files; one of `open` does with any of these flags."""
PATIENCE_SECONDS = 120.0
"""After this a child that should have ended is taken for one that hangs."""


@dataclass
class Child:
    """A forked process, the leader of a session of its own."""

    pid: int
    stderr: Path
    code: int | None = None

    def is_running(self) -> bool:
        """Tell whether it lives; a child that has died is buried here."""
        if self.code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if found else None
        return self.code is None

    def kill(self) -> int:
        """Send SIGKILL, if it still lives, and return how it ended."""
        if self.is_running():
            os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    def wait(self, seconds: float = PATIENCE_SECONDS) -> int:
        """Return its exit code, the negative number of the signal if one killed it."""
        end = time.monotonic() + seconds
        while self.is_running():
            if time.monotonic() > end:
                os.kill(self.pid, signal.SIGABRT)  # with which it says where it stands
                os.waitpid(self.pid, 0)
                raise TimeoutError(
                    f"process {self.pid} still ran after {seconds} s\n{self.errors()}"
                )
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def errors(self) -> str:
        """Return what it has written to stderr and stdout."""
        return self.stderr.read_text(encoding="utf-8") if self.stderr.exists() else ""

    def error_line(self) -> str:
        """Return its one line of an error; a traceback is none."""
        text = self.errors()
        lines = [line for line in text.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, text
        assert "Traceback" not in text, text
        return lines[0]


def start(
    function: Callable[..., object], *arguments: Any, stderr: Path, cwd: Path | None = None
) -> Child:
    """Run `function(*arguments)` in a fork that ends with its exit code: 0, or that of its exit.

    An exception ends it with 1, its traceback in `stderr`.
    """
    if torch.cuda.is_available():
        pytest.skip("a process whose autograd has threads for CUDA cannot be forked")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    with warnings.catch_warnings():
        # From Python 3.12 on a fork beside threads is warned of; zarr's reset themselves.
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        _run(function, arguments, stderr, cwd)
    return Child(pid, stderr)


def _run(
    function: Callable[..., object], arguments: tuple[Any, ...], stderr: Path, cwd: Path | None
) -> None:
    """Be the child; never return."""
    code = 1
    try:
        os.setsid()
        file = os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for descriptor in (1, 2):
            os.dup2(file, descriptor)
        sys.stdout = sys.__stdout__ = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        sys.stderr = sys.__stderr__ = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
        faulthandler.enable(sys.stderr)
        # What a shell starts in the background is deaf to Ctrl-C, and so is all that it starts.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        # The test runner's handlers would swallow what a stage says.
        logging.getLogger().handlers.clear()
        # A thread of the parent may have held the lock of progress bars; its monitor is gone.
        tqdm.set_lock(threading.RLock())
        tqdm.monitor_interval = 0
        tqdm.monitor = None
        if cwd is not None:
            os.chdir(cwd)
        function(*arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code)


def until_operation(
    number: int, log: Path, function: Callable[..., object], *arguments: Any
) -> None:
    """Run a function in a child, which kills itself before its n-th operation that changes a file.

    If there are fewer, `log` names them all, one a line.
    """
    done: list[str] = []

    def count(event: str, values: tuple[Any, ...]) -> None:
        if event in CHANGES or (event == "open" and (values[2] or 0) & WRITING):
            done.append(f"{event} {values[0]}")
            if len(done) == number:
                os.kill(os.getpid(), signal.SIGKILL)

    # A hook cannot be taken away again, which is why this is for a child.
    sys.addaudithook(count)
    try:
        function(*arguments)
    finally:
        log.write_text("\n".join(done), encoding="utf-8")


def decant(*arguments: str) -> None:
    """Run one command as the shell would; to be given to `start`."""
    main(list(arguments), prog_name="decant")
