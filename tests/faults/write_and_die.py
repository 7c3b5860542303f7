"""Writes the synthetic store and kills itself with SIGKILL at the n-th step; for the kill tests.

A step is everything between two points where the process could die and leave something behind: a
file that is written aside, a rename, and each step of the protocol.
"""

import os
import signal
import sys
from pathlib import Path

from pipeline import provenance
from tests.store.synthetic import Synthetic, name_of

NAMES = (name_of("hidden", 2, "int8"), name_of("logits", None, "dense"))


def main(root: Path, steps: int) -> None:
    left = steps

    def step(_: str = "") -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    replace = Path.replace

    def replace_between(self: Path, target: Path) -> Path:
        # Before: whole aside, not in place. After: in place, the directory not synced.
        step()
        result = replace(self, target)
        step()
        return result

    def write_half_way(_: int) -> None:
        step()

    Path.replace = replace_between
    provenance.os.fsync = write_half_way
    Synthetic(root, step).run(NAMES)
    sys.stdout.write(str(steps - left))
