"""One command in several processes of this machine that train together.

They find each other as `torchrun`'s do, by the same variables. Here so that an error is one line,
said once, and the exit code stays what it is: torchrun makes a page and 1 of it.
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
"""How long processes have to end by themselves when one has failed; each says why it ends."""
POLL_SECONDS = 0.1
APART_SECONDS = 1.0
"""Signals closer than this are one."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "recvValue failed")
"""How gloo and torch's store say that another process is gone."""
LOST_CODE = 75
"""The exit code of a process that only lost another one."""
SHOWN_BYTES = 4096
KEEPS = "goes on from the last checkpoint, if there is one"
"""What a training does when it is run again, to follow "the same command"."""
Process = subprocess.Popen[bytes]


def is_rank() -> bool:
    """Tell whether this process is one of several already, whoever started them."""
    return "RANK" in os.environ


def is_first() -> bool:
    """Tell whether this process speaks for all of them."""
    return int(os.environ.get("RANK", "0")) == 0


def is_lost_peer(error: BaseException) -> bool:
    """Tell whether an error only says that another process is gone, which says itself why."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and any(word in str(error) for word in LOST)


def check_gpus(device: str) -> None:
    """Refuse more processes than there are GPUs.

    Raises:
        ConfigError: With both numbers.
    """
    import torch

    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device.startswith("cuda") and processes > torch.cuda.device_count():
        raise ConfigError(
            f"runtime processes: found {processes}, expected at most one for each of the "
            f"{torch.cuda.device_count()} GPUs; lower it, or set device to cpu"
        )


def run_ranks(module: str, arguments: Sequence[str], *, processes: int, threads: int) -> int:
    """Run `python -m module` in so many processes, to the end of all.

    The first one speaks; of the others a failure is said, if the first has none of its own. An
    interrupt or a SIGTERM is passed on to all of them, and they have all the time they need to save
    their state; a second one gives them seconds.

    Args:
        module: What runs.
        arguments: What it is called with.
        processes: How many.
        threads: Of torch, in each; 0: its share of the cores.

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
    # DDP warns that it looks for weights without a gradient; a term that is off leaves some.
    quiet = {"OMP_NUM_THREADS": str(threads), "TORCH_CPP_LOG_LEVEL": "ERROR"}
    environment = quiet | os.environ
    environment |= {key: str(value) for key, value in shared.items()}
    with tempfile.TemporaryDirectory(prefix="decant-") as folder:
        said = [Path(folder) / str(rank) for rank in range(processes)]
        ranks: list[Process] = []
        forward = _Forward(ranks)
        before = {number: signal.signal(number, forward) for number in SIGNALS}
        try:
            for rank in range(processes):
                mine = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                with said[rank].open("wb") as file:
                    command = [sys.executable, "-m", module, *arguments]
                    stderr = None if rank == 0 else file
                    ranks.append(subprocess.Popen(command, env=mine, stderr=stderr))
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
            for one in ranks:
                one.kill()
                one.wait()
        if ranks[failed].returncode == -forward.number:
            # It was told to end before it could handle signals.
            click.echo(f"interrupted; the same command {KEEPS}", err=True)
            return 128 + forward.number
        has_spoken = ranks[0].returncode not in (0, LOST_CODE) and ranks[0].returncode > 0
        return _tell(failed, ranks[failed].returncode, None if has_spoken else said[failed])


class _Forward:
    """Passes a signal on to processes; raises at a second one."""

    def __init__(self, ranks: Sequence[Process]) -> None:
        self._ranks = ranks
        self.number = 0
        self._since = 0.0

    def __call__(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        for one in self._ranks:
            if one.poll() is None:
                one.send_signal(number)
        if self.number and now - self._since >= APART_SECONDS:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self._since = number, now


def _wait(ranks: Sequence[Process]) -> int | None:
    """Return which process failed first; None when all have ended well."""
    while True:
        codes = [one.poll() for one in ranks]
        for rank, code in enumerate(codes):
            if code:
                return rank
        if all(code == 0 for code in codes):
            return None
        time.sleep(POLL_SECONDS)


def _settle(ranks: Sequence[Process], last_word: signal.Signals) -> None:
    """Let processes end by themselves, then by a signal."""
    for word in (None, last_word):
        for one in ranks:
            if word is not None and one.poll() is None:
                one.send_signal(word)
        deadline = time.monotonic() + GRACE_SECONDS
        while any(one.poll() is None for one in ranks) and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)


def _culprit(ranks: Sequence[Process], first: int) -> int:
    """Return who failed by itself: the first to end may only have lost that one."""
    if ranks[first].returncode != LOST_CODE:
        return first
    told = (None, 0, LOST_CODE, -signal.SIGTERM)
    return next((rank for rank, one in enumerate(ranks) if one.poll() not in told), first)


def _tell(failed: int, code: int, said: Path | None) -> int:
    """Say what the first process has not said; return the exit code."""
    if said is not None:
        words = said.read_bytes()[-SHOWN_BYTES:].decode(errors="replace")
        line = next((one for one in words.splitlines() if one.startswith("error: ")), words)
        click.echo(line.rstrip(), err=True, nl=bool(line.strip()))
    if code < 0:
        click.echo(
            f"error: process {failed} was ended by signal {-code}, which a lack of memory may be "
            "the reason of; run the same command again: it goes on from the last checkpoint",
            err=True,
        )
        return 128 - code
    return code
