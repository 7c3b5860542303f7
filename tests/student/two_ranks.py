"""Trainings of several students, one after the other, in a process that is one of two.

python -m tests.student.two_ranks STORE ROOT, with their changes to `run` in ROOT/cases.json.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.student.objective import Objective
from tests.captured import Captured
from tests.student.runs import InterruptedRunError, interrupt, run


def main(store: Path, root: Path) -> None:
    for name, case in json.loads((root / "cases.json").read_text()).items():
        case["objective"] = Objective.model_validate(case["objective"])
        step = case.pop("interrupt", None)
        if step is not None:
            with pytest.MonkeyPatch.context() as patch:
                interrupt(patch, step)
                with pytest.raises(InterruptedRunError):
                    train(store, root / name, case)
        train(store, root / name, case)


def train(store: Path, root: Path, changes: dict[str, Any]) -> None:
    run(Captured(store, "causal-lm"), root, **changes)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
