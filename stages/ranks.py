"""Runs one command in several processes of this machine that train together.

They find each other by the same variables as those of `torchrun`. Unlike torchrun, an error is
printed once, on one line, and the exit code is the failed process's own.
"""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from pipeline.errors import ConfigError
from stages.command import INTERRUPTED

GRACE_SECONDS = 5.0
"""Time for the other processes to end by themselves after one has failed."""
POLL_SECONDS = 0.1
APART_SECONDS = 1.0
"""Signals that arrive closer together count as one."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "recvValue failed")
"""Messages of gloo and torch's store when another process is gone."""
LOST_TYPES = ("DistBackendError", "DistNetworkError", "DistStoreError")
"""Errors of NCCL and torch's store: of a peer, or of the network to it."""
LOST_CODE = 75
"""The exit code of a process that failed only because another one was gone."""
ONLY_LOST = (LOST_CODE, -signal.SIGABRT)
"""Exit codes of processes that lost a peer: NCCL's watchdog aborts its process."""
SHOWN_BYTES = 4096
KEEPS = "goes on from the last checkpoint, if there is one"
"""What repeating a training does, continuing the sentence "the same command ..."."""
Process = subprocess.Popen[bytes]


def is_rank() -> bool:
    """Tell whether this process is already one of several, started here or by torchrun."""
    return "RANK" in os.environ


def is_first() -> bool:
    """Tell whether this process is the one that prints."""
    return int(os.environ.get("RANK", "0")) == 0


def is_lost_peer(error: BaseException) -> bool:
    """Tell whether an error only means that another process is gone, which reports the cause."""
    is_told = type(error).__name__ in LOST_TYPES or any(word in str(error) for word in LOST)
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and is_told


def check_gpus(device: str) -> None:
    """Refuse processes that would share a GPU.

    Args:
        device: The device of `runtime.yaml`.

    Raises:
        ConfigError: If there are more processes than GPUs, or one GPU for several.
    """
    import torch

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if processes == 1 or not (device == "auto" or device.startswith("cuda")):
        return
    if device.startswith("cuda:"):
        raise ConfigError(
            f"runtime device: found {device} for {processes} processes, expected cuda, where each "
            "has a GPU of its own; correct it, or set processes to 1"
        )
    gpus = torch.cuda.device_count()
    if processes > gpus and (gpus or device == "cuda"):
        raise ConfigError(
            f"runtime processes: found {processes}, expected at most one for each of the {gpus} "
            "GPUs; lower it, or set device to cpu"
        )


def run_ranks(module: str, arguments: Sequence[str], *, processes: int, threads: int) -> int:
    """Run `python -m module` in several processes and wait for all of them.

    Only the first process prints. A failure of another one is printed if the first reports none. An
    interrupt or a SIGTERM is forwarded to all processes, which may take as long as they need to
    save their state; a second one ends them within seconds.

    Args:
        module: The module to run.
        arguments: Its command-line arguments.
        processes: Number of processes.
        threads: Threads of torch in each; 0: its share of the cores.

    Returns:
        The exit code of the process that failed first; 0 if all went well.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    threads = threads or max(1, (os.cpu_count() or 1) // processes)
    shared = {
        "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    # DDP warns about its search for weights without a gradient, which a term that is off leaves.
    quiet = {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment = quiet | os.environ
    environment |= {key: str(value) for key, value in shared.items()}
    with tempfile.TemporaryDirectory(prefix="decant-") as folder:
        outputs = [Path(folder) / str(rank) for rank in range(processes)]
        ranks: list[Process] = []
        forward = _Forward(ranks)
        before = {number: signal.signal(number, forward) for number in SIGNALS}
        try:
            for rank in range(processes):
                own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with outputs[rank].open("wb") as file:
                    command = [sys.executable, "-m", module, *arguments]
                    stderr = None if rank == 0 else file
                    ranks.append(subprocess.Popen(command, env=own, stderr=stderr))
            first = _wait(ranks)
            if first is None:
                return 0
            _settle(ranks, signal.SIGTERM)
            failed = _culprit(ranks, first)
        except KeyboardInterrupt:
            _settle(ranks, signal.SIGINT)
            return INTERRUPTED
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            for process in ranks:
                process.kill()
                process.wait()
        if ranks[failed].returncode == -forward.number:
            # The signal came before the process could handle signals.
            click.echo(f"interrupted; the same command {KEEPS}", err=True)
            return 128 + forward.number
        has_spoken = ranks[0].returncode not in (0, LOST_CODE) and ranks[0].returncode > 0
        return _tell(failed, ranks[failed].returncode, None if has_spoken else outputs[failed])


class _Forward:
    """Forwards a signal to processes; raises at a second one."""

    def __init__(self, ranks: Sequence[Process]) -> None:
        self._ranks = ranks
        self.number = 0
        self._since = 0.0

    def __call__(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        for process in self._ranks:
            if process.poll() is None:
                process.send_signal(number)
        if self.number and now - self._since >= APART_SECONDS:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self._since = number, now


def _wait(ranks: Sequence[Process]) -> int | None:
    """Return which process failed first; None if all succeeded."""
    while True:
        codes = [process.poll() for process in ranks]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(POLL_SECONDS)


def _settle(ranks: Sequence[Process], last_word: signal.Signals) -> None:
    """Wait for processes to end by themselves, then end them by a signal."""
    for word in (None, last_word):
        for process in ranks:
            if word is not None and process.poll() is None:
                process.send_signal(word)
        deadline = time.monotonic() + GRACE_SECONDS
        while any(process.poll() is None for process in ranks) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def _culprit(ranks: Sequence[Process], first: int) -> int:
    """Return the process that caused the failure: the first to end may only have lost it."""
    if ranks[first].returncode not in ONLY_LOST:
        return first
    codes = [process.poll() for process in ranks]
    told = (None, 0, *ONLY_LOST, -signal.SIGTERM)
    causes = [rank for rank, code in enumerate(codes) if code not in told]
    # If all only lost each other, one that has said so where it can be read.
    lost = [rank for rank, code in enumerate(codes) if rank and code == LOST_CODE]
    return next(iter(causes + lost), first)


def _tell(failed: int, code: int, output: Path | None) -> int:
    """Print the error that the first process has not printed; return the exit code."""
    if output is not None:
        words = output.read_bytes()[-SHOWN_BYTES:].decode(errors="replace")
        line = next((one for one in words.splitlines() if one.startswith("error: ")), words)
        click.echo(line.rstrip(), err=True, nl=bool(line.strip()))
    if code < 0:
        click.echo(
            f"error: process {failed} was ended by signal {-code}, possibly for lack of memory; "
            "run the same command again: it goes on from the last checkpoint",
            err=True,
        )
        return 128 - code
    return code
