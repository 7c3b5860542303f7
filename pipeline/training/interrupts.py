"""Interrupts: a training finishes its step and writes a checkpoint before it ends.

This is the effect of the first SIGINT or SIGTERM. A second one ends the process at once. All
processes of a training stop after the same step, whichever of them was interrupted.
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


class Stop:
    """Whether a run is to end, the same on all its processes, whichever was interrupted.

    Args:
        processes: How many train together.
    """

    def __init__(self, processes: int) -> None:
        self._number = 0
        # A group whose exchanges wait for no GPU.
        self._group: Any = dist.new_group(backend="gloo") if processes > 1 else None

    def is_asked(self) -> bool:
        """Tell whether the step that just ended is the last; every process asks after each."""
        number = torch.tensor(INTERRUPTS.number)
        if self._group is not None:
            dist.all_reduce(number, op=dist.ReduceOp.MAX, group=self._group)
        self._number = int(number)
        return self._number != 0

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
