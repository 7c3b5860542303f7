"""Interrupts of a training: the current step is finished and its checkpoint written first.

The first SIGINT or SIGTERM only asks for that. A second one ends the process at once. All processes
of a training stop after the same step, whichever of them was interrupted.
"""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import current_thread, main_thread
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
APART_SECONDS = 1.0
"""Signals closer than this are one: a terminal and a launcher may both pass on the same Ctrl-C."""
NOTICE = (
    b"\ninterrupted: writing a checkpoint after this step; interrupt once more to end at once\n"
)


class _Interrupts:
    """The signal that asked trainings of this process to end; 0 if none did."""

    def __init__(self) -> None:
        self.number = 0
        self._since = 0.0
        self._users = 0
        self._before: dict[int, Any] = {}

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """Note signals instead of ending at the first; of nested uses the outermost counts.

        A signal that the process ignores stays ignored. Threads other than the main one cannot
        handle signals, so nothing changes there.
        """
        if self._users == 0 and current_thread() is main_thread():
            self.number = 0
            self._before = {
                number: signal.signal(number, self._note)
                for number in SIGNALS
                if signal.getsignal(number) is not signal.SIG_IGN
            }
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: Any) -> None:
        if self.number and time.monotonic() - self._since >= APART_SECONDS:
            self._restore()
            signal.raise_signal(number)
        elif not self.number:
            self.number, self._since = number, time.monotonic()
            if os.environ.get("RANK", "0") == "0":
                # Not by logging: a handler may run within a write to the same stream.
                os.write(2, NOTICE)


INTERRUPTS = _Interrupts()


class StopAtInterrupt(TrainerCallback):
    """Saves and ends a run after the step in which any of its processes was interrupted."""

    def __init__(self) -> None:
        self._number = 0
        self._group: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make a group of processes whose exchanges wait for no GPU."""
        if args.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Ask for a checkpoint and for the end."""
        asked = torch.tensor(INTERRUPTS.number)
        if self._group is not None:
            dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=self._group)
        self._number = int(asked)
        if self._number:
            control.should_save = True
            control.should_training_stop = True

    def check(self, step: int) -> None:
        """Raise if the run was ended; every process waits until the checkpoint is written.

        Raises:
            Interrupted: With the step and the exit code.
        """
        if not self._number:
            return
        if self._group is not None:
            dist.barrier(group=self._group)
        raise Interrupted(f"goes on from the checkpoint of step {step}", 128 + self._number)
