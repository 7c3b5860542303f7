"""Weights that change as the run goes on: windows, phases, balance; resuming keeps them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import IntegrityError
from pipeline.provenance import read_json, write_json
from pipeline.student.align.distiller import Distiller, Losses
from pipeline.student.align.needs import select_signals
from pipeline.student.align.objective import Alignment, Objective
from pipeline.student.model.origin import StudentModel
from pipeline.training.checkpoints import last_complete_checkpoint
from tests.captured import Captured, prepared
from tests.student.runs import (
    SIGNALS,
    WITH_DROPOUT,
    InterruptedRunError,
    curve,
    equal,
    interrupt,
    run,
    train,
)

TERMS = ("feature", "attention", "output", "labels")


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("trainer"), "llama")
    found.capture(SIGNALS, blocks=[1, 2, 3])
    return found


def goal(**more: Any) -> Objective:
    weights: dict[str, Any] = {"feature": 0.5, "attention": 0.3, "output": 1.0, "labels": 0.5}
    weights |= {term: more.pop(term) for term in TERMS if term in more}
    sections: dict[str, Any] = {term: {"weight": weight} for term, weight in weights.items()}
    sections["feature"]["form"] = "bfloat16"
    sections["output"]["form"] = "topk"
    return Objective.model_validate(sections | more)


def test_two_phases_have_their_terms_and_a_schedule_each(store, tmp_path):
    run(
        store, tmp_path, objective=goal(phases={"features": 0.5}),
        options={"steps": 8, "warmup": 0.25, "learning_rate": 1e-2},
    )  # fmt: skip
    rows = curve(tmp_path)
    on = [tuple(term for term in TERMS if term in row) for row in rows]
    assert on == 4 * [("feature", "attention")] + 4 * [("output", "labels")]
    for row in rows[:4]:
        assert row["loss"] == pytest.approx(0.5 * row["feature"] + 0.3 * row["attention"], rel=1e-4)
    for row in rows[4:]:
        assert row["loss"] == pytest.approx(row["output"] + 0.5 * row["labels"], rel=1e-4)
    each = [0.0, 1e-2, 1e-2 * 2 / 3, 1e-2 / 3]
    assert [row["learning_rate"] for row in rows] == pytest.approx(2 * each, rel=1e-4)


def test_a_run_with_phases_and_balance_goes_on_at_the_switch_with_the_same_bits(
    store, undisturbed, tmp_path, monkeypatch
):
    changes = BALANCED | {"options": BALANCED["options"] | {"save_every": 5}}
    with monkeypatch.context() as patch:
        interrupt(patch, 7)
        with pytest.raises(InterruptedRunError):
            train(store, tmp_path, **changes)
    (directory,) = (tmp_path / "work" / "train").iterdir()
    assert last_complete_checkpoint(directory) == str(directory / "checkpoint-5")
    root, expected = undisturbed
    assert equal(train(store, tmp_path, **changes), expected)
    assert curve(tmp_path) == curve(root)


BALANCED: dict[str, Any] = {
    "architecture": WITH_DROPOUT,
    "objective": goal(phases={"features": 0.4}, balance="gradient_norm", balance_every=3),
    "options": {"steps": 12, "save_every": 100, "warmup": 0.1},
}
"""The first phase has 5 steps, so a second one begins between two measurements."""


@pytest.fixture(scope="module")
def undisturbed(store, tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    root = tmp_path_factory.mktemp("undisturbed")
    weights = train(store, root, **BALANCED)
    return root, weights


def test_a_term_is_measured_when_it_comes_on(undisturbed):
    rows = curve(undisturbed[0])
    assert rows[0]["factor_feature"] == 1.0
    assert rows[0]["factor_attention"] != 1.0  # measured within the first step
    assert rows[4]["factor_labels"] == 1.0
    assert rows[5]["factor_labels"] != 1.0  # the sixth step is the second phase's first
    assert len({row["factor_attention"] for row in rows[5:]}) == 1


def test_balanced_gradients_are_as_large_as_their_weights_say(store, tmp_path):
    """All examples in a step and a vanishing rate: every step has the same gradients."""
    weights = {"feature": 0.5, "attention": 0.25, "output": 1.0, "labels": 2.0}
    options = {"steps": 3, "learning_rate": 1e-12, "schedule": "constant_with_warmup"}
    found = []
    for name, batch, parts in (("whole", 14, 1), ("parts", 3, 5)):
        run(
            store, tmp_path / name, gradient_norms=True,
            objective=goal(**weights, balance="gradient_norm", balance_every=1),
            options=options | {"batch_size": batch, "gradient_accumulation_steps": parts},
        )  # fmt: skip
        found.append(curve(tmp_path / name)[-1])
    for row in found:
        for term in TERMS:
            norm = row[f"gradient_{term}"] / row["gradient_output"]
            assert norm == pytest.approx(weights[term], rel=0.01), term
    for term in TERMS:
        assert found[0][f"factor_{term}"] == pytest.approx(found[1][f"factor_{term}"], rel=1e-3)
    parts = [weights[t] * found[0][f"factor_{t}"] * found[0][t] for t in TERMS]
    assert found[0]["loss"] == pytest.approx(sum(parts), rel=1e-4)


def test_a_plain_run_has_no_factors(store, tmp_path):
    run(store, tmp_path, objective=goal(), options={"steps": 1})
    assert not [key for row in curve(tmp_path) for key in row if key.startswith("factor_")]


def test_the_mean_of_a_term_is_over_the_steps_it_was_on(store, tmp_path):
    objective = goal(feature={"value": 1.0, "to": 0.5}, attention={"value": 1.0, "from": 0.75})
    options = {"steps": 4, "learning_rate": 1e-3}
    run(store, tmp_path / "each", objective=objective, options=options | {"log_every": 1})
    run(store, tmp_path / "once", objective=objective, options=options | {"log_every": 4})
    rows, [whole] = curve(tmp_path / "each"), curve(tmp_path / "once")
    assert ["feature" in row for row in rows] == [True, True, False, False]
    assert ["attention" in row for row in rows] == [False, False, False, True]
    for term in TERMS:
        values = [row[term] for row in rows if term in row]
        assert whole[term] == pytest.approx(sum(values) / len(values), rel=1e-4), term


def test_a_step_at_which_nothing_counts_changes_no_weight(store, tmp_path):
    """A gap between windows: the terms are looked at and weigh nothing."""
    objective = goal(
        feature=0.0, attention=0.0, output={"value": 1.0, "to": 0.5},
        labels={"value": 1.0, "from": 0.75},
    )  # fmt: skip
    run(store, tmp_path, objective=objective, options={"steps": 4})
    rows = curve(tmp_path)
    assert [row["loss"] == 0 for row in rows] == [False, False, True, False]
    assert rows[2]["grad_norm"] == 0


def test_transport_and_relations_train_from_what_select_wrote(store, tmp_path):
    """A student of other head counts and two blocks; the file's lists stay lists."""
    architecture = WITH_DROPOUT | {
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1
    }  # fmt: skip
    objective = Objective.model_validate(
        {
            "feature": {"weight": 0.5, "loss": "cosine"},
            "attention": {"weight": 1.0, "loss": "relations", "relations": ["qq", "kk"]},
            "output": {"weight": 1.0, "loss": "skew_reverse_kl"},
        }
    )
    selected = select_signals(
        store.manifests(SIGNALS), name="tiny", objective=objective,
        align=Alignment(layers="emd"),
        model=StudentModel(architecture=architecture),
    )  # fmt: skip
    write_json(tmp_path / "selected.json", selected)
    selected = read_json(tmp_path / "selected.json")
    assert selected["maps"] == {
        "feature": {"0": 0, "1": [3], "2": [3]}, "attention": {"1": [3], "2": [3]}
    }  # fmt: skip
    weights = train(
        store, tmp_path, objective=objective, architecture=architecture, selected=selected,
        options={"steps": 12, "log_every": 4},
    )  # fmt: skip
    assert not [name for name in weights if "projector" in name]
    rows = curve(tmp_path)  # one a pass over all rows
    for term in ("feature", "attention", "output"):
        assert rows[-1][term] < rows[0][term], term


def test_a_term_that_is_not_finite_stops_the_run_by_name_and_step(store, tmp_path, monkeypatch):
    """The checkpoint after it is not taken, though no point of the curve is due before."""
    plain, calls = Distiller.forward, []

    def bad(self, batch, counts, factors=None, *, apart=False):
        losses = plain(self, batch, counts, factors, apart=apart)
        calls.append(losses)
        if len(calls) == 5:  # two micro-batches a step
            losses.terms["attention"] = losses.terms["attention"] * torch.inf
            return Losses(losses.total * torch.nan, losses.terms)
        return losses

    monkeypatch.setattr(Distiller, "forward", bad)
    said = "train tiny: the attention term is inf at step 3; lower learning_rate or the weight of"
    with pytest.raises(IntegrityError, match=said):
        run(store, tmp_path, options={"log_every": 50, "save_every": 2, "steps": 6})
    (directory,) = (tmp_path / "work" / "train").iterdir()
    assert last_complete_checkpoint(directory) == str(directory / "checkpoint-2")
    assert not (directory / "checkpoint-4").exists()
    assert not (tmp_path / "student").exists()


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
@pytest.mark.parametrize("phases", [{}, {"phases": {"features": 0.5}}], ids=["one", "a phase each"])
def test_a_single_step_moves_the_weights(phases, schedule, store, tmp_path):
    """Its warm-up would leave it a learning rate of 0."""
    terms = {"feature": {"weight": 1.0}, "output": {"weight": 1.0}}
    objective = Objective.model_validate(terms | phases)
    steps = 2 if phases else 1
    plain = {"steps": steps, "warmup": 0.05, "schedule": schedule}
    far, near = (
        train(
            store, tmp_path / str(n), objective=objective,
            options={**plain, "learning_rate": rate},
        )
        for n, rate in enumerate((1e-2, 1e-3))
    )  # fmt: skip
    assert [row["learning_rate"] for row in curve(tmp_path / "0")] == [1e-2] * steps
    assert not equal(far, near)
