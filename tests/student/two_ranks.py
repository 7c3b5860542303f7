"""Trainings of several students, one after the other, in a process that is one of two.

python -m tests.student.two_ranks STORE ROOT, with their changes to `run` in ROOT/cases.json.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import Interrupted
from pipeline.student.align.objective import Objective
from tests.captured import Captured
from tests.student.runs import InterruptedRunError, interrupt, run, send


def main(store: Path, root: Path) -> None:
    for name, case in json.loads((root / "cases.json").read_text()).items():
        case["objective"] = Objective.model_validate(case["objective"])
        if case.get("signal"):
            interrupted(store, root / name, case, case.pop("signal"))
        step = case.pop("interrupt", None)
        if step is not None:
            with pytest.MonkeyPatch.context() as patch:
                interrupt(patch, step)
                with pytest.raises(InterruptedRunError):
                    train(store, root / name, case)
        train(store, root / name, case)


def interrupted(store: Path, root: Path, case: dict[str, Any], step: int) -> None:
    """The second process alone is told to end; both leave one checkpoint, and the curve is due."""
    with pytest.MonkeyPatch.context() as patch:
        if os.environ["RANK"] == "1":
            send(patch, step, signal.SIGTERM)
        with pytest.raises(Interrupted, match=f"checkpoint of step {step}"):
            train(store, root, case)
    (marker,) = root.glob("work/train/*/checkpoint-*/complete.json")
    assert marker.parent.name == f"checkpoint-{step}"


def train(store: Path, root: Path, changes: dict[str, Any]) -> None:
    run(Captured(store, "causal-lm"), root, **changes)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
