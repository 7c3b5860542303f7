"""Sections of parameters: what is on by default, and what is refused."""

import pytest
import torch
from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.provenance import canonical_json
from pipeline.student.align.objective import Alignment, Objective, active_terms, check_task
from pipeline.student.losses.registry import LOSSES, FeatureLoss, find_loss
from pipeline.student.model.origin import StudentModel
from tests.installed import install_package


def test_a_term_is_off_until_it_has_a_weight():
    assert active_terms(Objective()) == ()
    goal = Objective.model_validate({"labels": {"weight": 1}, "feature": {"weight": 0.1}})
    assert active_terms(goal) == ("feature", "labels")


@pytest.mark.parametrize(
    "section",
    [
        {"features": {"weight": 1.0}},
        {"feature": {"weigth": 1.0}},
        {"feature": {"weight": -1.0}},
        {"feature": {"weight": float("nan")}},
        {"feature": {"loss": "cosin"}},
        {"output": {"temperature": 0}},
        {"output": {"temperature": float("inf")}},
        {"output": {"loss": "skew_forward_kl", "skew": 0.0}},
        {"output": {"loss": "skew_forward_kl", "skew": 1.0}},
        {"attention": {"relations": []}},
        {"attention": {"relations": ["qk"]}},
        {"attention": {"relation_heads": 0}},
        {"phases": {"features": 1.0}},
        {"phases": {"features": 0.5}},
        {"balance": "gradnorm"},
        {"balance_every": 0},
    ],
)
def test_what_is_no_objective_is_refused(section):
    with pytest.raises(ValidationError):
        Objective.model_validate(section)


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"attention": {"relations": ["qq", "qq"]}}, "relations qq, qq: expected each once"),
        ({"attention": {"loss": "relations", "form": "map"}}, "form map holds no query and key"),
        ({"output": {"loss": "mse", "temperature": 2.0}}, "temperature 2.0: loss mse compares"),
        ({"output": {"loss": "kld"}}, "found 'kld', expected one of forward_kl, reverse_kl"),
        ({"feature": {"loss": "mae"}}, "found 'mae', expected one of mse, cosine, pkd; correct"),
        ({"attention": {"loss": "mse"}}, "found 'mse', expected one of kl, head_mean, relations;"),
        ({"feature": {"projector": "mlp"}}, "found 'mlp', expected one of linear; correct"),
        ({"output": {"options": {"alpha": 0.5}}}, "options.alpha: loss forward_kl has no options"),
        ({"output": {"loss": "skew_forward_kl", "options": {"skew": 0.5}}},
         "options.skew: loss skew_forward_kl has no options"),
        ({"output": {"loss": "alpha_beta", "options": {"gamma": 0.5}}},
         "options.gamma: loss alpha_beta has the options alpha, beta; correct or remove"),
        ({"output": {"loss": "alpha_beta", "options": {"alpha": -1.0}}},
         "options.alpha: found -1.0, expected a number greater than or equal to 0"),
        ({"output": {"loss": "alpha_beta", "options": {"alpha": 0.0, "beta": 0.0}}},
         "options: alpha 0 and beta 0: expected one of them above 0"),
        ({"output": {"loss": "alpha_beta", "options": {"alpha": 0.001}}},
         "options: alpha 0.001: expected 0 or at least 0.01"),
        ({"labels": {"weight": 1.0}, "phases": {"features": 0.5}},
         "phases: the terms that are on are labels, expected feature or attention"),
        ({"feature": {"weight": 1.0}, "phases": {"features": 0.5}}, "are feature, expected"),
    ],
)  # fmt: skip
def test_what_contradicts_itself_is_refused_with_the_reason(section, match):
    with pytest.raises(ValidationError, match=match):
        Objective.model_validate(section)


ALL_ON = {term: {"weight": 1.0} for term in ("feature", "attention", "output", "labels")}


def test_phases_split_the_steps():
    goal = Objective.model_validate(ALL_ON | {"phases": {"features": 0.3}})
    on = [set(goal.weights_at(step, 10)) for step in range(10)]
    assert on == 3 * [{"feature", "attention"}] + 7 * [{"output", "labels"}]
    assert goal.phases is not None
    assert [goal.phases.first_steps(steps) for steps in (1, 2, 3, 100)] == [0, 1, 1, 30]


def test_weights_that_are_zero_now_are_left_out():
    goal = Objective.model_validate(
        {
            "feature": {"weight": {"value": 2.0, "to": 0.5}},
            "output": {"weight": {"start": 0.0, "end": 1.0}},
            "labels": {"weight": {"value": 0.5, "from": 0.5}},
        }
    )
    assert active_terms(goal) == ("feature", "output", "labels")
    assert goal.weights_at(0, 4) == {"feature": 2.0}
    assert goal.weights_at(1, 4) == {"feature": 2.0, "output": 0.25}
    assert goal.weights_at(2, 4) == {"output": 0.5, "labels": 0.5}


SOFTMAX = (
    "forward_kl", "reverse_kl", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl", "alpha_beta"
)  # fmt: skip


@pytest.mark.parametrize(
    ("task", "fitting"),
    [
        ("causal-lm", {*SOFTMAX, "mse"}),
        ("prompt-target", {*SOFTMAX, "mse"}),
        ("messages", {*SOFTMAX, "mse"}),
        ("classification", {*SOFTMAX, "mse"}),
        ("multi-label", {"binary_kl", "mse"}),
        ("regression", {"mse"}),
    ],
)
def test_an_output_loss_fits_some_tasks(task, fitting):
    for loss in (*SOFTMAX, "mse", "binary_kl"):
        goal = Objective.model_validate({"output": {"loss": loss, "weight": 1.0}})
        if loss in fitting:
            check_task(goal, task)
            continue
        with pytest.raises(ConfigError, match=rf"x\.output\.loss: {loss} does not fit .* {task};"):
            check_task(goal, task, key="x")
    check_task(Objective(), task)  # off


def test_options_of_a_loss_are_complete_and_leave_other_records_alone():
    term = Objective.model_validate({"output": {"loss": "alpha_beta", "options": {"beta": 0.0}}})
    assert term.output.loss_options() == {"alpha": 0.2, "beta": 0.0}
    assert term.record()["output"]["options"] == {"beta": 0.0}
    assert Objective.model_validate_json(canonical_json(term.record())) == term
    skewed = Objective.model_validate({"output": {"loss": "skew_reverse_kl", "skew": 0.4}})
    assert skewed.output.loss_options() == {"skew": 0.4}
    assert Objective().output.loss_options() == {}
    assert set(Objective().record()["output"]) == {"loss", "weight", "temperature", "skew", "form"}


HUBER = """
from pipeline.student.losses.registry import feature_loss
from pipeline.student.losses.counting import sum_over_count
from torch.nn.functional import huber_loss

@feature_loss("huber")
def huber(student, teacher, count=None):
    return sum_over_count(huber_loss(student, teacher, reduction="none").mean(-1), count)
"""


@pytest.fixture
def more_losses(monkeypatch, tmp_path):
    entries = {"decant.losses": {"feature.huber": "more_losses:huber"}}
    install_package(
        monkeypatch, tmp_path, name="more-losses", code=HUBER, entries=entries, version="2.1"
    )
    monkeypatch.delitem(vars(LOSSES), "_theirs", raising=False)
    yield
    monkeypatch.undo()
    vars(LOSSES).pop("_theirs", None)
    LOSSES._loaded.clear()


def test_a_loss_of_another_package_is_used_and_recorded(more_losses):
    goal = Objective.model_validate({"feature": {"loss": "huber", "weight": 1.0}})
    loss = find_loss(FeatureLoss, goal.feature.loss)
    assert loss(torch.ones(2, 3), torch.zeros(2, 3)).item() == pytest.approx(0.5)
    assert goal.record()["origins"] == {
        "feature.huber": {"package": "more-losses", "version": "2.1"}
    }
    off = Objective.model_validate({"feature": {"loss": "huber"}})
    assert "origins" not in off.record()


def test_a_layer_map_may_come_from_json():
    assert Alignment.model_validate_json('{"layers": {"1": 3}}').layers == {1: 3}
    with pytest.raises(ValidationError, match="found 'unifrom', expected one of uniform, last, em"):
        Alignment.model_validate({"layers": "unifrom"})


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({}, "exactly one of architecture and checkpoint"),
        ({"architecture": {}, "checkpoint": "x"}, "exactly one of architecture and checkpoint"),
        ({"checkpoint": "x", "init": "teacher-layers"}, "brings its own weights"),
        ({"architecture": {}, "blocks": [1]}, "blocks are for init: teacher-layers"),
    ],
)
def test_a_student_has_one_origin(section, match):
    with pytest.raises(ValidationError, match=match):
        StudentModel.model_validate(section)
