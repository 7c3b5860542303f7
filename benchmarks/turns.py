"""Arms of a benchmark take turns, so that what the machine does beside hits every arm alike.

A ratio is of two laps of one turn. A first turn warms up and does not count. An arm may be a
process of its own: then the peak of its memory is its own, too.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import click
import psutil

Laps = dict[str, list[dict[str, Any]]]
"""By arm, what each counted lap answered."""


class Process:
    """An arm that runs `serve` in a process of its own.

    Args:
        module: The module that it runs.
        name: The arm.
        setting: What all arms share, JSON values.
    """

    def __init__(self, module: str, name: str, setting: Mapping[str, Any]) -> None:
        self._name = name
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115, as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", module, name, json.dumps(setting)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=os.environ | {"TQDM_DISABLE": "1"},
        )

    def read(self) -> dict[str, Any]:
        """Wait for an answer; the first says that the arm is ready."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            said = self._errors.read().strip().splitlines()[-8:]
            raise click.ClickException("\n".join([f"{self._name}: ended with {code}", *said]))
        return json.loads(line)

    def ask(self, order: str) -> dict[str, Any]:
        """Give an order and wait for its answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{order}\n")
        self._process.stdin.flush()
        return self.read()

    def end(self) -> None:
        """Let the process end."""
        self._process.communicate()
        self._errors.close()


def serve(answer: Callable[[str], dict[str, Any]]) -> None:
    """Answer each line of standard input; first of all say that the arm is ready.

    Every answer has `peak_bytes`, the most memory since it was ready, its workers' own included,
    and `loaded_bytes`, what it had then.
    """
    # Loading has a peak of its own; from here on Linux counts anew.
    Path("/proc/self/clear_refs").write_text("5")
    before = psutil.Process().memory_info().rss
    print("{}", flush=True)
    for line in sys.stdin:
        found = answer(line.strip())
        memory = {"peak_bytes": peak_bytes(), "loaded_bytes": before}
        print(json.dumps(found | memory), flush=True)


def peak_bytes() -> int:
    """Return the most memory of this process since it was counted anew, and its workers' own."""
    (line,) = (
        one for one in Path("/proc/self/status").read_text().splitlines() if one[:6] == "VmHWM:"
    )
    workers = psutil.Process().children(recursive=True)
    return int(line.split()[1]) * 1024 + sum(one.memory_full_info().uss for one in workers)


def cpu_seconds() -> float:
    """Return the CPU time of this process and of workers that it has."""
    own = psutil.Process()
    times = [one.cpu_times() for one in (own, *own.children(recursive=True))]
    return sum(one.user + one.system for one in times)


class Answering(Protocol):
    """An arm: a process of its own, or an object of this one."""

    def ask(self, order: str) -> dict[str, Any]:
        """Do what the order says and say how it went."""
        ...


def interleaved(
    arms: Mapping[str, Answering], laps: int, order: str = "lap", *, warm_up: int = 1
) -> Laps:
    """Let the arms take turns, each the first in its turn once; first rounds do not count."""
    found: Laps = {name: [] for name in arms}
    for turn in range(laps + warm_up):
        names = list(arms)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            lap = arms[name].ask(order)
            if turn >= warm_up:
                found[name].append(lap)
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def over(laps: Laps, name: str, base: str, key: str) -> dict[str, float]:
    """Return the spread of one arm's laps over those of another, turn by turn."""
    return spread([a[key] / b[key] for a, b in zip(laps[name], laps[base], strict=True)])
