"""A teacher that takes its worker process with it; stands for `load_teacher`."""

import ctypes
import multiprocessing
import os
import resource
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.teacher.source.load import load_teacher

MEGABYTES_AT_MOST = 4000
BLOCK_MEGABYTES = 64
Beginning = tuple[int, ...]
"""The first tokens of a row."""


def be_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def crash() -> None:
    """A real access beyond memory, without the file that the kernel may leave of it."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    ctypes.string_at(0)


def take_memory() -> None:
    """Take more and more until somebody ends this process, which then is no more."""
    taken = []
    while len(taken) * BLOCK_MEGABYTES < MEGABYTES_AT_MOST:
        taken.append(torch.ones(BLOCK_MEGABYTES * 2**18))
        time.sleep(0.02)


def ask_for_too_much() -> None:
    """The process survives this one: the allocator refuses."""
    torch.empty(2**50)


def hang() -> None:
    """A forward pass that takes its time."""
    time.sleep(600)


@dataclass(frozen=True)
class DyingTeacher:
    """Loads the teacher; at a row it does what `what` says by the row's beginning, so many times.

    Each time leaves a file in `deaths` first, with the process's number in it. A forked test is
    no worker, and neither is the process that checks the taps.
    """

    what: Mapping[Beginning, Callable[[], None]]
    deaths: Path
    times: int = 1

    def __call__(self, *arguments: Any, **keywords: Any) -> PreTrainedModel:
        model = load_teacher(*arguments, **keywords)
        if multiprocessing.parent_process() is not None:
            model.get_input_embeddings().register_forward_pre_hook(self._look)
        return model

    def _look(self, _: nn.Module, arguments: tuple[Tensor]) -> None:
        for row, do in self.what.items():
            begins = arguments[0][:, : len(row)] == torch.tensor(row)
            if begins.all(-1).any() and self._is_time(row):
                do()

    def _is_time(self, row: Beginning) -> bool:
        self.deaths.mkdir(exist_ok=True)
        for count in range(self.times):
            aside = self.deaths / f".{os.getpid()}"
            aside.write_text(str(os.getpid()))
            try:
                # Whole at once, and one process alone succeeds.
                os.link(aside, self.deaths / f"{row}-{count}")
            except FileExistsError:
                continue
            return True
        return False

    def count(self) -> int:
        """Return how often it has happened."""
        return len(list(self.deaths.glob("(*")))

    def pids(self, row: Beginning) -> list[int]:
        """Return the processes in which it happened at a row."""
        return [int(path.read_text()) for path in sorted(self.deaths.glob(f"{row}-*"))]
