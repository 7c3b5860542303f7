"""What a student starts as: the teacher's blocks, whole or cut, a checkpoint, adapters."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.student.align.objective import Objective
from pipeline.student.model.origin import LoraOptions
from tests.captured import Captured, prepared
from tests.student.runs import SIGNALS, InterruptedRunError, equal, interrupt, train
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("train"), "llama")
    found.capture(SIGNALS, blocks=[1, 2, 3])
    return found


def test_a_student_may_start_from_the_teachers_blocks(store, tmp_path):
    """One step at a vanishing rate leaves the teacher's own weights in place."""
    weights = train(
        store, tmp_path, init="teacher-layers",
        architecture={"num_hidden_layers": 2},
        objective=Objective.model_validate({"labels": {"weight": 1.0}}),
        options={"steps": 1, "learning_rate": 1e-12},
    )  # fmt: skip
    teacher = load_file(store.teacher / "model" / "model.safetensors")
    for ours, theirs in (("layers.0.", "layers.1."), ("layers.1.", "layers.2.")):
        name = "model.{}self_attn.q_proj.weight"
        torch.testing.assert_close(weights[name.format(ours)], teacher[name.format(theirs)])


def test_only_adapters_train_and_an_interrupted_run_ends_with_the_same_bits(
    store, tmp_path, monkeypatch
):
    """The export has the checkpoint's names; what no adapter is beside has its very weights."""
    checkpoint = tmp_path / "checkpoint"
    start = tiny_model("llama", layers=1, seed=7)
    start.save_pretrained(checkpoint)
    changes: dict[str, Any] = {
        "architecture": None,
        "checkpoint": str(checkpoint),
        "lora": LoraOptions(r=2, dropout=0.1),
    }
    expected = train(store, tmp_path / "whole", **changes)
    with monkeypatch.context() as patch:
        interrupt(patch, 5)
        with pytest.raises(InterruptedRunError):
            train(store, tmp_path / "parts", **changes)
    assert equal(train(store, tmp_path / "parts", **changes), expected)
    first = start.state_dict()
    assert expected.keys() == first.keys()
    for name, value in expected.items():
        assert torch.equal(value, first[name]) != name.endswith("_proj.weight"), name


def test_a_checkpoint_with_replaced_weights_starts_anew(store, tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint"
    tiny_model("llama", layers=1).save_pretrained(checkpoint)
    changes: dict[str, Any] = {"architecture": None, "checkpoint": str(checkpoint)}
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(InterruptedRunError):
            train(store, tmp_path, **changes)
    tiny_model("llama", layers=1, seed=5).save_pretrained(checkpoint)
    found = train(store, tmp_path, **changes)
    assert equal(found, train(store, tmp_path / "alone", **changes))


def test_a_narrower_student_starts_from_the_teachers_blocks(store, tmp_path):
    """One step at a vanishing rate leaves the weights that were cut out in place."""
    weights = train(
        store, tmp_path, init="teacher-layers",
        architecture={
            "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24,
            "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        },
        objective=Objective.model_validate({"labels": {"weight": 1.0}}),
        options={"steps": 1, "learning_rate": 1e-12},
    )  # fmt: skip
    teacher = load_file(store.teacher / "model" / "model.safetensors")
    name = "model.embed_tokens.weight"
    assert weights[name].shape == (64, 16)
    for channel in weights[name].T:
        close = (teacher[name] - channel[:, None]).abs().amax(0) < 1e-6
        assert close.sum() == 1
