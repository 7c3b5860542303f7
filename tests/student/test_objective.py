"""Sections of parameters: what is on by default, and what is refused."""

import pytest
from pydantic import ValidationError

from pipeline.errors import ConfigError
from pipeline.student.align.objective import Alignment, Objective, active_terms, check_task
from pipeline.student.model.origin import StudentModel


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


SOFTMAX = ("forward_kl", "reverse_kl", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl")


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


def test_a_layer_map_may_come_from_json():
    assert Alignment.model_validate_json('{"layers": {"1": 3}}').layers == {1: 3}


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
