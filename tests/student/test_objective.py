"""Sections of parameters: what is on by default, and what is refused."""

import pytest
from pydantic import ValidationError

from pipeline.student.distiller import active_terms
from pipeline.student.objective import Alignment, Objective
from pipeline.student.origin import StudentModel


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
        {"feature": {"loss": "cosine"}},
        {"output": {"temperature": 0}},
        {"output": {"temperature": float("inf")}},
    ],
)
def test_what_is_no_objective_is_refused(section):
    with pytest.raises(ValidationError):
        Objective.model_validate(section)


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
