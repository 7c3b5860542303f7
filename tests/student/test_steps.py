"""The loop of stage two: what it reports, and what it leaves behind however it ends."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from pipeline.errors import IntegrityError
from pipeline.provenance import write_json
from pipeline.student.loop.gradient import StepGradient
from pipeline.student.loop.steps import StudentLoop
from pipeline.student.loop.train import StudentRun
from pipeline.training.checkpoints import MARKER
from pipeline.training.memory import peak_memory_bytes
from tests.captured import Captured, prepared
from tests.student.runs import SIGNALS, train, training_of


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("steps"), "llama")
    found.capture(SIGNALS, blocks=[1, 2, 3])
    return found


class Rows(TrainerCallback):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.events: list[str] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.events.append("begin")

    def on_save(self, args, state, control, **kwargs):
        self.events.append(f"save {state.global_step}")

    def on_train_end(self, args, state, control, **kwargs):
        self.events.append("end")

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append({"step": state.global_step, **(logs or {})})


def loop(store: Captured, root: Path, **options: Any) -> tuple[StudentLoop, Rows]:
    rows = Rows()
    run = StudentRun(training_of(store, root, options=options))
    run._reporters = [rows]
    return run.loop(), rows


def test_reports_get_means_the_pace_and_the_peak_of_memory(store, tmp_path, caplog):
    each, singly = loop(store, tmp_path / "each", steps=3, learning_rate=1e-3)
    with caplog.at_level(logging.INFO, logger="pipeline.student.loop.curve"):
        assert list(each.steps()) == [0.0, 2 / 7, 4 / 7]
    twice, report = loop(store, tmp_path / "twice", steps=3, learning_rate=1e-3, log_every=2)
    for _ in twice.steps():
        pass
    first, second, end = report.rows
    assert [row["step"] for row in report.rows] == [2, 3, 3]
    assert first["loss"] == pytest.approx(sum(row["loss"] for row in singly.rows[:2]) / 2)
    assert second["loss"] == singly.rows[2]["loss"]
    assert {"feature", "grad_norm", "learning_rate", "epoch"} <= first.keys()
    assert first["tokens_per_second"] > 0
    assert {"train_runtime", "train_loss", "train_steps_per_second"} <= end.keys()
    peak = singly.rows[-1]["peak_memory_bytes"]
    assert 10**7 < peak <= peak_memory_bytes(torch.device("cpu"))
    assert f"train tiny: peak memory {peak / 1e9:.2f} GB (cpu)" in caplog.text
    assert report.events == ["begin", "save 3", "end"]


@pytest.mark.parametrize("is_bad", [False, True])
def test_bar_and_reports_are_closed_however_a_run_ends(is_bad, store, tmp_path):
    one, report = loop(store, tmp_path, steps=20 if is_bad else 1)
    if is_bad:
        one._optimizer.param_groups[0]["initial_lr"] = 1e30
        one._schedule.base_lrs[0] = 1e30
    with pytest.raises(IntegrityError) if is_bad else nullcontext():
        for _ in one.steps():
            pass
    assert report.events[-1] == "end"
    assert report.events.count("end") == 1
    bar = one._curve._progress._bar
    assert bar is not None
    assert bar.disable


def test_a_gradient_that_is_not_finite_stops_a_run_whose_loss_is(store, tmp_path, monkeypatch):
    """No point of the curve is due before the checkpoint that would keep it."""
    plain = StepGradient.clip

    def clip(self, state):
        if state.global_step == 2:
            for parameter in self._model.parameters():
                if parameter.grad is not None:
                    parameter.grad += torch.inf
        return plain(self, state)

    monkeypatch.setattr(StepGradient, "clip", clip)
    said = "the loss is finite and its gradient's norm is inf at step 3; lower learning_rate, then"
    with pytest.raises(IntegrityError, match=f"train tiny: {said}"):
        train(store, tmp_path, options={"log_every": 50, "save_every": 3})
    assert not list(tmp_path.glob("work/train/*/checkpoint-*"))


def test_who_leaves_in_the_middle_leaves_no_bar_and_no_report_open(store, tmp_path):
    one, report = loop(store, tmp_path)
    steps = one.steps()
    next(steps)
    next(steps)
    steps.close()
    assert report.events == ["begin", "end"]
    assert not list(tmp_path.glob("work/train/*/checkpoint-*"))


def test_a_checkpoint_of_another_layout_is_left_alone(store, tmp_path):
    """An earlier version's has another name: it is not loaded."""
    earlier = tmp_path / "work" / "train" / "tiny-0123456789abcdef" / "checkpoint-3"
    write_json(earlier / MARKER, {"step": 3})
    train(store, tmp_path, options={"steps": 1})
    assert (earlier / MARKER).exists()
