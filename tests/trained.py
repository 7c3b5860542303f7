"""Students trained from a tiny store, by the real `train_student`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.runtime import Runtime
from pipeline.store.signals import Signal
from pipeline.student.align.needs import select_signals
from pipeline.student.align.objective import Alignment, Objective
from pipeline.student.loop.train import train_student
from pipeline.student.loop.training import Training
from pipeline.student.model.origin import StudentModel
from pipeline.student.parameters import StudentParams
from pipeline.training.options import TrainOptions
from tests.captured import Captured

BLOCKS = (1, 2, 3)
"""Blocks that the store must have kept."""


def trained(
    store: Captured,
    root: Path,
    signals: Sequence[Signal],
    *,
    objective: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    blocks: Any = None,
    **model: Any,
) -> Path:
    """Select and train with keys of `students.S.model`; return the student's directory."""
    goal = Objective.model_validate(objective)
    start = StudentModel(blocks=blocks, **model)
    selected = select_signals(
        store.manifests(signals, BLOCKS),
        name="tiny",
        objective=goal,
        align=Alignment(),
        model=start,
    )
    plain = {"steps": 2, "batch_size": 2, "learning_rate": 1e-2, "log_every": 1}
    train_student(
        Training(
            name="tiny",
            selected=selected,
            stores=store.stores,
            output=root / "student",
            curve=root / "curve.csv",
            work=root / "work",
            student=StudentParams(
                teacher="main",
                model=start,
                loss=goal,
                train=TrainOptions(**plain | dict(options or {})),
                pool_segments=2,
            ),
            runtime=Runtime(device="cpu"),
        )
    )
    return root / "student"
