"""Training from a store: accumulation, resuming, export; nothing but the store is needed."""

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.evaluate.agreement import agreement
from pipeline.provenance import fingerprint
from pipeline.student.align.needs import select_signals
from pipeline.student.align.objective import Alignment, Objective
from pipeline.student.data.batch_order import BatchOrder
from pipeline.student.loop.train import write_curve
from pipeline.student.model.origin import StudentModel
from pipeline.training.checkpoints import MARKER, last_complete_checkpoint
from tests.captured import Captured, copied, prepared, signal
from tests.student.runs import (
    ARCHITECTURE,
    GOAL,
    SIGNALS,
    WITH_DROPOUT,
    InterruptedRunError,
    curve,
    equal,
    interrupt,
    run,
    train,
)
from tests.tiny import PAD_ID


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("train"), "llama")
    found.capture(SIGNALS, blocks=[1, 2, 3])
    return found


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


def test_accumulation_and_micro_batches_equal_one_big_batch(store, tmp_path):
    """The same examples in pieces of unequal counts, or at once: the same step, norm by norm."""
    plain = {"steps": 3, "schedule": "constant_with_warmup"}
    # 14 in a batch: one step an epoch, whatever the pieces.
    ways: dict[str, tuple[int, int, int, bool]] = {
        "whole": (14, 1, 0, False),
        "accumulated": (3, 5, 0, False),
        "in micro-batches": (14, 1, 4, True),
        "in both": (5, 3, 2, True),
    }
    found = {}
    for name, (batch, parts, piece, recompute) in ways.items():
        options = plain | {
            "batch_size": batch, "gradient_accumulation_steps": parts,
            "gradient_checkpointing": recompute,
        }  # fmt: skip
        found[name] = train(
            store, tmp_path / name, options=options, micro_batch_size=piece, gradient_norms=True
        )
    rows = {name: curve(tmp_path / name) for name in ways}
    norms = {f"gradient_{term}" for term in ("feature", "attention", "output", "labels")}
    assert norms <= rows["whole"][0].keys()
    for name in ways:
        for key, value in found["whole"].items():
            torch.testing.assert_close(found[name][key], value, rtol=1e-3, atol=2e-5)
        for one, other in zip(rows["whole"], rows[name], strict=True):
            assert one.keys() == other.keys()
            for key in one:
                assert one[key] == pytest.approx(other[key], rel=1e-4), (name, key)


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
    digests = store.digests()
    assert record["signals"] == {one.name: digests[one.name] for one in SIGNALS}
    assert record["store"] == store.store.name
    assert record["objective_fingerprint"] == fingerprint(GOAL.model_dump(mode="json"))


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
        selected_at, name="tiny", objective=GOAL, align=Alignment(),
        model=StudentModel(architecture=ARCHITECTURE),
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
         "rows may have 32 tokens, LlamaForCausalLM takes 16"),
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
    with pytest.raises(IntegrityError, match=r"train tiny: the \w+ term is (nan|inf) at step"):
        train(store, tmp_path, options={"steps": 20, "learning_rate": 1e30})
    assert not (tmp_path / "student").exists()
