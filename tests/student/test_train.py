"""Training from a store: accumulation, resuming, export; nothing but the store is needed."""

import csv
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.evaluate.agreement import agreement
from pipeline.student.needs import select_signals
from pipeline.student.objective import Alignment, Objective
from pipeline.student.origin import LoraOptions
from pipeline.student.stream import BatchOrder
from pipeline.student.train import train_student, write_curve
from pipeline.training.checkpoints import MARKER, Progress, last_complete_checkpoint
from pipeline.training.options import TrainOptions
from tests.captured import Captured, copied, prepared, signal
from tests.tiny import PAD_ID, tiny_model

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


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("train"), "llama")
    found.capture(SIGNALS, blocks=[1, 2, 3])
    return found


def train(store: Captured, root: Path, **changes: Any) -> dict[str, torch.Tensor]:
    """Train a student of one block; return the exported weights."""
    run(store, root, **changes)
    return load_file(root / "student" / "model.safetensors")


def run(store: Captured, root: Path, **changes: Any) -> None:
    options = {
        "steps": 9, "batch_size": 2, "gradient_accumulation_steps": 2, "warmup": 0.0,
        "schedule": "linear", "log_every": 1, "save_every": 3, "learning_rate": 1e-2,
    }  # fmt: skip
    options |= changes.pop("options", {})
    goal = changes.pop("objective", GOAL)
    architecture = changes.pop("architecture", ARCHITECTURE)
    selected = changes.pop("selected", None) or select_signals(
        store.manifests(changes.pop("signals", SIGNALS), [1, 2, 3]),
        name="tiny",
        objective=goal,
        align=Alignment(),
        architecture=architecture,
        checkpoint=changes.get("checkpoint"),
        init=changes.get("init", "random"),
        blocks=None,
    )
    arguments: dict[str, Any] = {
        "name": "tiny",
        "selected": selected,
        "stores": store.stores,
        "output": root / "student",
        "curve": root / "curve.csv",
        "work": root / "work",
        "architecture": architecture,
        "checkpoint": None,
        "init": "random",
        "objective": goal,
        "options": TrainOptions(**options),
        "pool_segments": 2,
        "gradient_norms": False,
        "device": "cpu",
    }
    train_student(**arguments | changes)


def equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


def curve(root: Path) -> list[dict[str, float]]:
    with (root / "curve.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def interrupt(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """End the run by an exception when `step` steps are done."""
    plain = Progress.on_step_end

    def at(self, args, state, control, **kwargs):
        plain(self, args, state, control, **kwargs)
        if state.global_step == step:
            raise InterruptedRunError

    monkeypatch.setattr(Progress, "on_step_end", at)


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """14 examples in batches of 2, accumulated by 2: 4 steps an epoch, 9 in all, with dropout."""
    root = tmp_path_factory.mktemp("undisturbed")
    return root, train(store, root, architecture=WITH_DROPOUT)


@pytest.mark.parametrize(
    ("step", "save_every", "resumed"),
    [(5, 3, 3), (8, 3, 6), (6, 4, 4), (2, 3, None)],
    ids=["mid epoch", "mid second epoch", "epoch boundary", "before any checkpoint"],
)
def test_an_interrupted_run_ends_with_the_same_bits(
    step, save_every, resumed, store, undisturbed, tmp_path, monkeypatch
):
    changes = {
        "architecture": WITH_DROPOUT,
        "options": {"save_every": save_every},
    }
    with monkeypatch.context() as patch:
        interrupt(patch, step)
        with pytest.raises(InterruptedRunError):
            train(store, tmp_path, **changes)
    (directory,) = (tmp_path / "work" / "train").iterdir()
    found = last_complete_checkpoint(directory)
    assert found == (None if resumed is None else str(directory / f"checkpoint-{resumed}"))
    assert not (tmp_path / "student").exists()
    root, expected = undisturbed
    assert equal(train(store, tmp_path, **changes), expected)
    assert curve(tmp_path) == curve(root)
    assert not directory.exists()


def test_every_epoch_has_its_own_order_also_after_resuming(store, tmp_path, monkeypatch):
    epochs: list[int] = []
    plain = BatchOrder.__iter__

    def spied(self):
        epochs.append(self._epoch)
        return plain(self)

    monkeypatch.setattr(BatchOrder, "__iter__", spied)
    with monkeypatch.context() as patch:
        interrupt(patch, 7)
        with pytest.raises(InterruptedRunError):
            train(store, tmp_path)
    assert epochs == [0, 1]
    train(store, tmp_path)
    assert epochs == [0, 1, 1, 2]


def test_a_checkpoint_without_its_marker_is_not_used(store, undisturbed, tmp_path, monkeypatch):
    changes = {"architecture": WITH_DROPOUT}
    with monkeypatch.context() as patch:
        interrupt(patch, 8)
        with pytest.raises(InterruptedRunError):
            train(store, tmp_path, **changes)
    (directory,) = (tmp_path / "work" / "train").iterdir()
    (directory / "checkpoint-6" / MARKER).unlink()
    (directory / "checkpoint-6" / "model.safetensors").write_bytes(b"half")
    assert last_complete_checkpoint(directory) == str(directory / "checkpoint-3")
    assert equal(train(store, tmp_path, **changes), undisturbed[1])


def test_a_checkpoint_of_other_parameters_is_not_used(store, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt(patch, 4)
        with pytest.raises(InterruptedRunError):
            train(store, tmp_path, options={"learning_rate": 1e-3})
    alone = train(store, tmp_path / "alone")
    assert equal(train(store, tmp_path), alone)
    (left,) = (tmp_path / "work" / "train").iterdir()
    assert last_complete_checkpoint(left) is not None


def test_accumulation_equals_one_big_batch(store, tmp_path):
    """The same examples in micro-batches of unequal counts, or at once: the same step."""
    options = {"steps": 3, "schedule": "constant_with_warmup"}
    # 14 in a batch: one step an epoch, whatever the micro-batches.
    runs = {
        (14, 1): train(
            store, tmp_path / "a",
            options=options | {"batch_size": 14, "gradient_accumulation_steps": 1},
        ),
        (3, 5): train(
            store, tmp_path / "b",
            options=options | {"batch_size": 3, "gradient_accumulation_steps": 5},
        ),
    }  # fmt: skip
    whole, parts = runs.values()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-3, atol=2e-5)
    for one, other in zip(curve(tmp_path / "a"), curve(tmp_path / "b"), strict=True):
        for term in ("loss", "feature", "attention", "output", "labels", "grad_norm"):
            assert one[term] == pytest.approx(other[term], rel=1e-4), term


def test_gradient_checkpointing_trains_to_the_same_bits(store, tmp_path, monkeypatch):
    calls = []
    plain = torch.utils.checkpoint.checkpoint

    def counted(*args, **kwargs):
        calls.append(kwargs.get("use_reentrant"))
        return plain(*args, **kwargs)

    expected = train(store, tmp_path / "plain", options={"steps": 2})
    monkeypatch.setattr("transformers.modeling_utils.checkpoint", counted, raising=False)
    monkeypatch.setattr("torch.utils.checkpoint.checkpoint", counted)
    found = train(store, tmp_path / "less", options={"steps": 2, "gradient_checkpointing": True})
    assert equal(found, expected)
    assert calls
    assert set(calls) == {False}


def test_the_curve_has_a_column_a_term_and_norms_on_request(store, tmp_path):
    goal = GOAL.model_copy(update={"attention": Objective().attention})
    train(
        store, tmp_path, objective=goal, gradient_norms=True,
        options={"steps": 4, "log_every": 2, "gradient_checkpointing": True},
    )  # fmt: skip
    rows = curve(tmp_path)
    assert [row["step"] for row in rows] == [2, 4]
    assert list(rows[0]) == [
        "step", "epoch", "loss", "feature", "output", "labels",
        "gradient_feature", "gradient_labels", "gradient_output", "grad_norm", "learning_rate",
    ]  # fmt: skip
    for row in rows:
        parts = [row[f"gradient_{term}"] for term in ("feature", "output", "labels")]
        assert all(part > 0 for part in parts)


def test_a_run_shorter_than_the_interval_of_logs_has_a_curve(store, tmp_path):
    run(store, tmp_path, options={"steps": 3, "log_every": 10})
    assert [row["step"] for row in curve(tmp_path)] == [3]


def test_the_norm_of_a_single_terms_gradient_is_the_whole_gradients(store, tmp_path):
    """Over all micro-batches of the step, not the last one's."""
    goal = Objective.model_validate({"labels": {"weight": 2.0}})
    train(
        store, tmp_path, objective=goal, gradient_norms=True,
        options={"steps": 2, "batch_size": 3, "gradient_accumulation_steps": 3},
    )  # fmt: skip
    for row in curve(tmp_path):
        assert row["gradient_labels"] == pytest.approx(row["grad_norm"], rel=1e-4)
        assert row["loss"] == pytest.approx(2 * row["labels"], rel=1e-5)


def test_the_export_is_a_plain_model_without_projectors(store, tmp_path):
    weights = train(store, tmp_path, options={"steps": 1})
    assert not [name for name in weights if "projector" in name or "student." in name]
    directory = tmp_path / "student"
    assert "decant" not in (directory / "config.json").read_text()
    model = AutoModelForCausalLM.from_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert model(**tokenizer("w3 w9", return_tensors="pt")).logits.shape[-1] == len(tokenizer)
    record = json.loads((directory / "distillation.json").read_text())
    assert set(record["signals"]) == {one.name for one in SIGNALS}


@pytest.mark.parametrize(
    ("kind", "architecture"), [("llama", ARCHITECTURE), ("bert", {"num_hidden_layers": 1})]
)
def test_an_exported_classifier_knows_its_classes_and_padding(
    kind, architecture, captured, tmp_path
):
    store = captured(kind, "classification" if kind == "llama" else None)
    dense = signal("logits", None, "dense")
    goal = Objective.model_validate({"output": {"weight": 1.0}, "labels": {"weight": 0.5}})
    train(
        store, tmp_path, signals=[dense], objective=goal, architecture=architecture,
        options={"steps": 1},
    )  # fmt: skip
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student").eval()
    assert model.config.pad_token_id == PAD_ID == store.reader.plan["pad_id"]
    assert list(model.config.id2label.values()) == ["no", "yes"]


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


def test_columns_of_the_curve_are_terms_then_gradients_and_factors(tmp_path):
    row = {"loss": 1.0, "step": 1, "factor_output": 2.0, "gradient_output": 3.0, "output": 1.0}
    write_curve([row, {"eval": 1.0}], tmp_path / "curve.csv")
    header = "step,loss,output,factor_output,gradient_output"
    assert (tmp_path / "curve.csv").read_text().splitlines() == [header, "1,1,1,2,3"]


def test_nothing_but_the_store_is_needed(store, tmp_path, monkeypatch):
    """With the teacher gone and no network, a live teacher fails; training and agreement run."""
    alone = copied(store, tmp_path / "alone")
    selected_at = alone.manifests(SIGNALS)
    shutil.rmtree(alone.teacher)
    shutil.rmtree(alone.tokens)

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("the network is closed")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(OSError, match="closed"):
        socket.create_connection(("127.0.0.1", 9))
    with pytest.raises((OSError, ValueError)):
        alone.load_teacher()
    selected = select_signals(
        selected_at, name="tiny", objective=GOAL, align=Alignment(), architecture=ARCHITECTURE,
        checkpoint=None, init="random", blocks=None,
    )  # fmt: skip
    train(alone, tmp_path, selected=selected, options={"steps": 3})
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    name = SIGNALS[-1].name
    found = agreement(
        model, alone.store, name, selected["signals"][name],
        batch_tokens=40, device=torch.device("cpu"),
    )  # fmt: skip
    assert found["kl"] > 0
    assert 0 <= found["top1"] <= 1


@pytest.mark.parametrize("logits", [signal("logits", None, "head"), SIGNALS[-1]])
def test_the_teacher_agrees_with_itself(logits, captured, tmp_path):
    """KL is 0 to the form's error, and top-1 is 1, at exactly the positions that count."""
    store = captured("llama") if logits.form.name == "head" else None
    if store is None:
        store = prepared(tmp_path, "llama")
        store.capture([logits])
    found = agreement(
        store.load_teacher(), store.store, logits.name, store.digests()[logits.name],
        batch_tokens=40, device=torch.device("cpu"),
    )  # fmt: skip
    assert abs(found["kl"]) < 1e-3
    assert found["top1"] > 0.95


def test_a_store_of_other_digests_is_refused_before_the_first_step(store, tmp_path):
    selected = {
        "store": store.store.name,
        "signals": {SIGNALS[-1].name: "0" * 64},
        "assets": {},
        "maps": {"feature": {}, "attention": {}},
    }
    goal = Objective.model_validate({"output": {"weight": 1.0}})
    with pytest.raises(IncompatibleError, match=r"has digest .* expected 0000"):
        train(store, tmp_path, selected=selected, objective=goal)
    with pytest.raises(IntegrityError, match="run the capture stage first"):
        train(store, tmp_path, selected=selected | {"store": "none"}, objective=goal)
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize(
    ("objective", "architecture", "match"),
    [
        ({"output": {"weight": 1.0, "temperature": 3.0}}, {}, r"temperature: 3.0.*\[1.0\]"),
        ({"attention": {"weight": 1.0}}, {"num_attention_heads": 2, "num_key_value_heads": 1},
         "has 4 attention heads, student layer 1 has 2"),
        ({"labels": {"weight": 1.0}}, {"max_position_embeddings": 16},
         "16 positions, the corpus has rows of up to 32"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_the_first_step(
    objective, architecture, match, store, tmp_path
):
    with pytest.raises(IncompatibleError, match=match):
        train(
            store, tmp_path,
            objective=Objective.model_validate(objective),
            architecture=ARCHITECTURE | architecture,
        )  # fmt: skip
    assert not (tmp_path / "student").exists()


def test_a_loss_that_is_not_finite_stops_the_run(store, tmp_path):
    with pytest.raises(IntegrityError, match=r"train tiny: the loss is (nan|inf) at step"):
        train(store, tmp_path, options={"steps": 20, "learning_rate": 1e30})
    assert not (tmp_path / "student").exists()


@pytest.mark.slow
def test_two_ranks_train_as_one_of_twice_the_batch(store, tmp_path):
    alone = train(store, tmp_path / "one", options={"steps": 4, "batch_size": 4})
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    script = (
        "import sys; from pathlib import Path; from tests.captured import Captured\n"
        "from tests.student.test_train import run\n"
        "run(Captured(Path(sys.argv[1]), 'causal-lm'), Path(sys.argv[2]),"
        " options={'steps': 4, 'batch_size': 2})"
    )
    ranks = []
    for rank in range(2):
        environment = os.environ | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
        command = [sys.executable, "-c", script, str(store.root), str(tmp_path / "two")]
        ranks.append(subprocess.Popen(command, env=environment, cwd=Path(__file__).parents[2]))
    assert [process.wait(timeout=240) for process in ranks] == [0, 0]
    shared = load_file(tmp_path / "two" / "student" / "model.safetensors")
    for name, value in alone.items():
        torch.testing.assert_close(shared[name], value, rtol=1e-3, atol=2e-5)
    for one, other in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        for term in ("loss", "feature", "attention", "output", "labels", "grad_norm"):
            assert one[term] == pytest.approx(other[term], rel=1e-4), term
