"""Section `teachers.T.capture`: kinds, forms and what is said of those that do not exist."""

import pytest
from pydantic import ValidationError

from pipeline.teacher.capture.request import resolve_signals
from pipeline.teacher.parameters.capture import CaptureParams


def names(**section) -> list[str]:
    params = CaptureParams.model_validate(section)
    found = resolve_signals(
        params.requests(), params.logits_form(), depth=4, task="causal-lm", key="capture"
    )
    return [signal.name.rsplit("-", 1)[0] for signal in found]


def test_values_have_one_form_and_need_not_name_it():
    assert names(value={"layers": [2, 4]}) == ["value/2/int8", "value/4/int8"]
    assert names(value={"layers": "all", "form": "int8"})[-1] == "value/4/int8"


def test_forms_of_attention_stand_side_by_side():
    found = names(
        hidden={"layers": [1], "form": "int8"},
        attention=[
            {"layers": [1], "form": "qk"},
            {"layers": [1, 2], "form": "map"},
            {"layers": [2], "form": "below"},
        ],
        logits={"form": "sampled", "n": 16},
    )
    assert found == [
        "hidden/1/int8", "attention/1/qk", "attention/1/map", "attention/2/map",
        "attention/2/below", "logits/sampled",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("section", "match"),
    [
        ({"value": {"layers": [1], "form": "qk"}}, "value.form: found 'qk', expected one of int8"),
        ({"value": {"layers": [1], "n": 3}}, "value.n: the form int8 has no such option"),
        (
            {"attention": {"layers": [1], "form": "eager"}},
            "attention.form: found 'eager', expected one of below, map, qk",
        ),
        ({"logits": {"form": "sampled", "n": 0}}, "logits.n: found 0, expected"),
        ({"fraction": 0.5}, "nothing to capture; add hidden, attention, value, logits or blocks"),
    ],
)
def test_what_does_not_exist_is_named(section, match):
    with pytest.raises((ValidationError, ValueError), match=match):
        names(**section)
