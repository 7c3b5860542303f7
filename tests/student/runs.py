"""Runs of the real `train_student` on a tiny store, to compare with one another."""

import csv
import json
import os
import signal as signals
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.runtime import Runtime
from pipeline.student.align.needs import select_signals
from pipeline.student.align.objective import Alignment, Objective
from pipeline.student.loop import checkpoint
from pipeline.student.loop.train import train_student
from pipeline.student.loop.training import Training
from pipeline.student.model.origin import StudentModel
from pipeline.student.parameters import StudentParams
from pipeline.training.options import TrainOptions
from pipeline.training.progress import Progress
from tests.captured import Captured, signal

SIGNALS = [
    signal("hidden", 0, "bfloat16"),
    signal("hidden", 3, "bfloat16"),
    signal("attention", 3, "qk"),
    signal("logits", None, "topk", k=8),
]
GOAL = Objective.model_validate(
    {
        "feature": {"weight": {"start": 0.5, "end": 0.1}, "form": "bfloat16"},
        "attention": {"weight": 0.3},
        "output": {"weight": 1.0, "form": "topk"},
        "labels": {"weight": 0.5},
    }
)
ARCHITECTURE = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 16, "head_dim": 4}

WITH_DROPOUT = ARCHITECTURE | {"attention_dropout": 0.3}


class InterruptedRunError(Exception):
    pass


def train(store: Captured, root: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Train a student of one block; return the exported weights."""
    run(store, root, **changes)
    return load_file(root / "student" / "model.safetensors")


def run(store: Captured, root: Path, **changes: Any) -> None:
    train_student(training_of(store, root, **changes))


def training_of(store: Captured, root: Path, **changes: Any) -> Training:
    """Return a training with changed fields, its own or of its sections."""
    options = {
        "steps": 9, "batch_size": 2, "gradient_accumulation_steps": 2, "warmup": 0.0,
        "schedule": "linear", "log_every": 1, "save_every": 3, "learning_rate": 1e-2,
    }  # fmt: skip
    options |= changes.pop("options", {})
    goal = changes.pop("objective", GOAL)
    model = changes.pop("model", None) or StudentModel(
        architecture=changes.pop("architecture", ARCHITECTURE),
        **{key: changes.pop(key) for key in StudentModel.model_fields if key in changes},
    )
    selected = changes.pop("selected", None) or select_signals(
        store.manifests(changes.pop("signals", SIGNALS), [1, 2, 3]),
        name="tiny",
        objective=goal,
        align=Alignment(),
        model=model,
    )
    student, machine = (
        {key: changes.pop(key) for key in section.model_fields if key in changes}
        for section in (StudentParams, Runtime)
    )
    plain = {"teacher": "main", "loss": goal, "train": TrainOptions(**options), "pool_segments": 2}
    files: dict[str, Any] = {
        "name": "tiny",
        "stores": store.stores,
        "output": root / "student",
        "curve": root / "curve.csv",
        "work": root / "work",
    }
    return Training(
        selected=selected,
        student=StudentParams(**plain | student, model=model),
        runtime=Runtime(**{"device": "cpu"} | machine),
        **files | changes,
    )


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def curve(root: Path) -> list[dict[str, float]]:
    """The logged rows; a term that was off has no value."""
    with (root / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


def after_each_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[str, int], None]) -> None:
    """Call `act` with what is trained, as the bar says it, and the step that is done."""
    plain = Progress.advance

    def advance(self, step, tokens):
        plain(self, step, tokens)
        act(self._description, step)

    monkeypatch.setattr(Progress, "advance", advance)


def send(monkeypatch: pytest.MonkeyPatch, step: int, *numbers: int) -> None:
    """Send signals to this process when `step` steps are done."""

    def act(_: str, done: int) -> None:
        if done == step:
            for number in numbers:
                signals.raise_signal(number)

    after_each_step(monkeypatch, act)


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the run by an exception when `step` steps are done."""

    def act(_: str, done: int) -> None:
        if done == step:
            raise InterruptedRunError

    after_each_step(monkeypatch, act)


def after_each_checkpoint(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], None]) -> None:
    """Call `act` with each checkpoint when it is complete."""
    plain = checkpoint.mark_complete

    def mark(path: Path, *features: Any) -> None:
        plain(path, *features)
        act(path)

    monkeypatch.setattr(checkpoint, "mark_complete", mark)


def train_on_two_ranks(store: Captured, root: Path, cases: Mapping[str, Any]) -> None:
    """Train students, each below `root` by its name, in two processes that share their batches."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root.mkdir(parents=True, exist_ok=True)
    (root / "cases.json").write_text(json.dumps(cases))
    command = [sys.executable, "-m", "tests.student.two_ranks", store.root, root]
    ranks = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        ranks.append(subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2]))
    assert [process.wait(timeout=240) for process in ranks] == [0, 0]
