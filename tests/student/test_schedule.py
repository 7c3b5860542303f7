import pytest
from pydantic import ValidationError

from pipeline.student.align.objective import Weight


def test_a_number_is_constant():
    weight = Weight.model_validate_json("0.3")
    assert [weight.weight_at(p) for p in (0.0, 0.5, 1.0)] == [0.3, 0.3, 0.3]
    assert not weight.is_off
    assert Weight.model_validate_json("2").weight_at(0.0) == 2.0


def test_a_line_reaches_its_end_exactly_and_stays():
    weight = Weight.model_validate_json('{"start": 1, "end": 0.2, "until": 0.5}')
    assert weight.weight_at(0.0) == 1.0
    assert weight.weight_at(0.25) == pytest.approx(0.6)
    assert weight.weight_at(0.5) == weight.weight_at(1.0) == weight.weight_at(1.5) == 0.2
    decaying = Weight.model_validate_json('{"start": 0.1}')
    assert decaying.weight_at(0.5) == pytest.approx(0.05)
    assert decaying.weight_at(1.0) == 0.0


def test_a_window_is_on_from_its_start_to_before_its_end():
    weight = Weight.model_validate_json('{"value": 0.5, "from": 0.25, "to": 0.75}')
    found = [weight.weight_at(p) for p in (0.0, 0.2, 0.25, 0.5, 0.75, 1.0)]
    assert found == [0.0, 0.0, 0.5, 0.5, 0.0, 0.0]
    late = Weight.model_validate_json('{"value": 1, "from": 0.5}')
    assert [late.weight_at(p) for p in (0.49, 0.5, 1.0, 1.5)] == [0.0, 1.0, 1.0, 1.0]
    assert not late.is_off
    assert Weight.model_validate_json('{"value": 0}').is_off
    assert Weight.model_validate_json(weight.model_dump_json()) == weight


def test_off_is_zero_for_the_whole_run():
    assert Weight.model_validate_json("0").is_off
    assert Weight.model_validate_json("0.0").is_off
    assert Weight.model_validate_json('{"start": 0, "end": 0}').is_off
    assert not Weight.model_validate_json('{"start": 1, "end": 0}').is_off
    assert not Weight.model_validate_json('{"start": 0, "end": 1}').is_off


@pytest.mark.parametrize(
    "text",
    [
        "-0.1",
        "NaN",
        "Infinity",
        '"0.1"',
        "true",
        "null",
        '{"start": -1}',
        '{"start": 1, "until": 0}',
        '{"start": 1, "until": 1.5}',
        '{"start": 1, "untill": 0.5}',
        '{"end": 1}',
        '{"start": NaN}',
        '{"value": 1, "from": 0.5, "to": 0.5}',
        '{"value": 1, "from": 1.0}',
        '{"value": 1, "start": 1}',
        '{"from": 0.5}',
    ],
)
def test_what_is_no_weight_is_refused(text):
    with pytest.raises(ValidationError):
        Weight.model_validate_json(text)


def test_it_is_frozen_and_survives_json():
    weight = Weight.model_validate_json('{"start": 1, "end": 0.2, "until": 0.5}')
    assert Weight.model_validate_json(weight.model_dump_json()) == weight
    with pytest.raises(ValidationError):
        weight.root = 2.0
