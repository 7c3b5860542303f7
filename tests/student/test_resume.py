"""A run that goes on from a checkpoint in mid-epoch is the run that was never stopped, to the bit.

Six steps, four an epoch, a checkpoint after the third, points of the curve after the second and the
fourth: what the third found must come out of the checkpoint, too.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.provenance import read_json
from pipeline.student.align.needs import select_signals
from pipeline.student.align.objective import Alignment, Objective
from pipeline.student.model.origin import LoraOptions, StudentModel
from pipeline.training.progress import PACE
from tests.captured import Captured, prepared, signal
from tests.student.runs import SIGNALS, WITH_DROPOUT, after_each_checkpoint, curve, equal, train

HEAD = signal("logits", None, "head")
HIDDEN, ATTENTION, TOPK = (SIGNALS[:2], SIGNALS[2:3], SIGNALS[3:])
WEIGHTS: dict[str, Any] = {
    "feature": {"weight": {"start": 0.5, "end": 0.1, "until": 0.7}},
    "attention": {"weight": 0.3},
    "output": {"weight": 1.0},
    "labels": {"weight": {"value": 0.5, "from": 0.2}},
}
TWO_BLOCKS = WITH_DROPOUT | {
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "features": {
        "signals": HIDDEN,
        "objective": {"feature": {"loss": "cosine", "weight": {"start": 0.5, "until": 0.4}}},
    },
    "attention, off at the end": {
        "signals": ATTENTION,
        "objective": {"attention": {"weight": {"value": 1.0, "to": 0.6}}},
        "options": {"schedule": "cosine"},
    },
    "output, a skewed divergence, adafactor": {
        "signals": TOPK,
        "objective": {"output": {"weight": 1.0, "loss": "skew_reverse_kl"}},
        "options": {"optimizer": "adafactor"},
    },
    "labels, recomputed activations": {
        "signals": TOPK,
        "objective": {"labels": {"weight": 1.0}},
        "options": {
            "schedule": "constant_with_warmup", "warmup": 0.6, "gradient_checkpointing": True
        },
    },
    "every term, in micro-batches": {"gradient_norms": True, "micro_batch_size": 1},
    "every term, in bfloat16": {"options": {"precision": "bfloat16", "batch_size": 4}},
    "two phases, balanced": {
        "objective": WEIGHTS
        | {"phases": {"features": 0.4}, "balance": "gradient_norm", "balance_every": 2},
        "micro_batch_size": 1,
    },
    "adapters": {
        "init": "teacher-layers",
        "architecture": {"num_hidden_layers": 1, "attention_dropout": 0.3},
        "lora": LoraOptions(dropout=0.2),
    },
    "eight bits a moment": {
        "signals": TOPK,
        "objective": {"output": {"weight": 1.0}},
        "architecture": WITH_DROPOUT | {"intermediate_size": 256},
        "options": {"optimizer": "adamw_8bit"},
    },
    "transport and relations": {
        "align": Alignment(layers="emd"),
        "architecture": TWO_BLOCKS,
        "objective": {
            "feature": {"weight": 0.5}, "attention": {"weight": 1.0, "loss": "relations"}
        },
    },
    "part of the vocabulary": {
        "signals": [*HIDDEN, HEAD],
        "objective": {"feature": {"weight": 0.1}, "output": {"weight": 1.0, "temperature": 2.0}},
        "vocabulary": "corpus",
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("resume"), "llama")
    value = signal("value", 3, "int8")
    found.capture([*SIGNALS, HEAD, value], blocks=[1, 2, 3])
    return found


def changes(store: Captured, case: str) -> dict[str, Any]:
    """Return what `train` is given for a case."""
    asked = {"architecture": WITH_DROPOUT, "objective": WEIGHTS, "signals": SIGNALS} | CASES[case]
    asked["objective"] = objective = Objective.model_validate(asked["objective"])
    signals, align = list(asked.pop("signals")), asked.pop("align", Alignment())
    if objective.attention.loss == "relations":
        signals.append(signal("value", 3, "int8"))
    asked["selected"] = select_signals(
        store.manifests(signals, [1, 2, 3]),
        name="tiny", objective=objective, align=align, model=StudentModel(
            architecture=asked["architecture"], init=asked.get("init", "random")
        ),
    )  # fmt: skip
    asked["options"] = {"steps": 6, "save_every": 3, "log_every": 2} | asked.get("options", {})
    if asked["options"].get("batch_size") == 4:
        asked["options"]["gradient_accumulation_steps"] = 1
    return asked


def keep_the_third(monkeypatch: pytest.MonkeyPatch, into: Path) -> list[Path]:
    """Copy the checkpoint of step 3 as a process that dies after it would leave it."""
    found: list[Path] = []

    def copy(checkpoint: Path) -> None:
        if checkpoint.name == "checkpoint-3":
            found.append(into / checkpoint.parent.name)
            shutil.copytree(checkpoint, found[0] / checkpoint.name)

    after_each_checkpoint(monkeypatch, copy)
    return found


def history(checkpoint: Path) -> list[dict[str, float]]:
    """The log as a checkpoint has it, without what a clock says."""
    rows = read_json(checkpoint / "trainer_state.json")["log_history"]
    return [{key: value for key, value in row.items() if key != PACE} for row in rows]


@pytest.mark.filterwarnings("ignore:.*CPU gemm_4bit.*")
@pytest.mark.parametrize("case", CASES)
def test_going_on_in_mid_epoch_gives_the_same_bits(case, store, tmp_path, monkeypatch):
    asked, work = changes(store, case), tmp_path / "again" / "work" / "train"
    written: list[str] = []
    with monkeypatch.context() as patch:
        (kept,) = [keep_the_third(patch, work)]
        expected = train(store, tmp_path / "whole", **dict(asked))
    (directory,) = kept
    assert [row["step"] for row in history(directory / "checkpoint-3")] == [2]
    assert (directory / "checkpoint-3" / "values_0.safetensors").exists()
    after_each_checkpoint(monkeypatch, lambda checkpoint: written.append(checkpoint.name))
    torch.manual_seed(99)  # a new process knows nothing of the old one's random state
    assert equal(train(store, tmp_path / "again", **dict(asked)), expected)
    assert written == ["checkpoint-6"]
    rows = curve(tmp_path / "again")
    assert rows == curve(tmp_path / "whole")
    assert [row["step"] for row in rows] == [2, 4, 6]
