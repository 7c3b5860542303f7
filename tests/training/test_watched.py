"""A run that is watched: what is logged, and how it stops when something is not finite."""

import logging
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments

from pipeline.errors import IntegrityError, ResourceError
from pipeline.training.memory import peak_memory_bytes
from pipeline.training.watched import WatchedTrainer


class Point(nn.Module):
    """A weight w; the loss of x is x * sqrt(|w|), whose gradient is not finite at w = 0."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (x * self.weight.abs().sqrt()).mean()}


class Rows(TrainerCallback):
    """Keeps what is logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.rows.append({"step": state.global_step, **(logs or {})})


def watched(
    directory: Path, values: list[float], weight: float = 1.0, **options: Any
) -> tuple[WatchedTrainer, Rows]:
    """A run over these values, a step each, that counts ten tokens when it is asked."""
    options = {
        "per_device_train_batch_size": 1, "num_train_epochs": 1, "logging_steps": 100,
        "save_strategy": "steps", "save_steps": 2, "logging_nan_inf_filter": False,
        "train_sampling_strategy": "sequential", "disable_tqdm": True, "report_to": "none",
    } | options  # fmt: skip
    rows, tokens = Rows(), iter(range(0, 10_000, 10))
    trainer = WatchedTrainer(
        description="train x",
        tokens=lambda: next(tokens),
        args=TrainingArguments(output_dir=str(directory), use_cpu=True, **options),
        callbacks=[rows],
        model=Point(weight),
        train_dataset=[{"x": value} for value in values],
    )
    return trainer, rows


def test_a_log_has_means_the_pace_and_at_the_end_the_peak_of_memory(tmp_path, caplog):
    trainer, report = watched(tmp_path, [1.0, 2.0, 3.0], logging_steps=2, learning_rate=0.0)
    with caplog.at_level(logging.INFO, logger="pipeline.training.watched"):
        trainer.train_from(None)
    first, second, end = report.rows
    assert [(row["step"], row["loss"]) for row in (first, second)] == [(2, 1.5), (3, 3.0)]
    assert {"grad_norm", "learning_rate", "epoch"} <= first.keys()
    assert first["tokens_per_second"] > 0
    assert end["peak_memory_bytes"] > 10**7
    assert f"train x: peak memory {end['peak_memory_bytes'] / 1e9:.2f} GB (cpu)" in caplog.text
    assert peak_memory_bytes(torch.device("cpu")) >= end["peak_memory_bytes"]


@pytest.mark.parametrize(
    ("values", "weight", "said"),
    [
        ([1.0, float("nan"), 1.0], 1.0, "the loss is nan at step 2"),
        ([1.0, 1.0, float("inf"), 1.0, 1.0], 1.0, "the loss is inf at step 3"),
        ([1.0, 1.0, 1.0], 0.0, "the loss is finite and its gradient's norm is nan at step 1"),
    ],
    ids=["at the checkpoint", "between two checkpoints", "gradient"],
)
def test_it_stops_before_a_bad_checkpoint_and_says_where_it_began(values, weight, said, tmp_path):
    """No point of the curve is due before the checkpoint that would keep it."""
    trainer, report = watched(tmp_path, values, weight)
    with pytest.raises(IntegrityError, match=f"train x: {said}; lower learning_rate, then run"):
        trainer.train_from(None)
    assert report.rows == []
    step = int(said[-1])
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"] * (step > 2)


def test_a_step_that_loss_scaling_skips_does_not_stop_it(tmp_path, monkeypatch):
    trainer, _ = watched(tmp_path, [1.0, 1.0], logging_steps=1)
    trainer.args.fp16 = True
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", lambda *_: torch.tensor(torch.inf))
    trainer.train_from(None)
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    trainer.log({"loss": 1.0})
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-9)
    with pytest.raises(IntegrityError, match="not finite in float16 at any scale, at step 2; set"):
        trainer.log({"loss": 1.0})


@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_the_bar_is_closed_however_a_run_ends(value, tmp_path):
    trainer, _ = watched(tmp_path, [value])
    with nullcontext() if value == 1.0 else pytest.raises(IntegrityError):
        trainer.train_from(None)
    bar = trainer._progress._bar
    assert bar is not None
    assert bar.disable


@pytest.mark.parametrize("step", [2, 3])
def test_beyond_the_last_step_none_is_taken(step, tmp_path):
    """Going on from the last checkpoint gives its weights; from an earlier one, the same."""
    first, _ = watched(tmp_path, [1.0, 2.0, 3.0], logging_steps=1)
    first.train_from(None)
    again, rows = watched(tmp_path, [1.0, 2.0, 3.0], logging_steps=1)
    again.train_from(tmp_path / f"checkpoint-{step}")
    assert again.state.global_step == 3
    assert [row["step"] for row in rows.rows if "loss" in row] == [3] * (step < 3)
    assert torch.equal(again.model.weight, first.model.weight)


def test_a_full_disk_is_told_with_needed_and_free_bytes(tmp_path, monkeypatch):
    trainer, _ = watched(tmp_path, [1.0])

    def fail(**_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 4 vs 3")

    monkeypatch.setattr(trainer, "train", fail)
    with pytest.raises(ResourceError, match=r"unexpected pos.*needs about 12 bytes, [\d,]+ free"):
        trainer.train_from(None)
