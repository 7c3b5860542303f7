"""Files of other stages are read whole, or refused with their name and key."""

import re

import pytest

from pipeline.errors import IntegrityError
from pipeline.provenance import write_json
from pipeline.report.results import (
    ModelMetrics,
    SignalResult,
    TeacherResult,
    in_order,
    labels,
    load_corpus,
    load_curve,
    load_student,
    load_teacher,
)


def signal(name, tokens=10):
    return {
        "signal": name,
        "form": "f",
        "digest": "d",
        "tokens": tokens,
        "bytes": 40,
        "segments": 2,
        "store": "s",
    }


def test_a_teacher_has_its_signals_in_layer_order(tmp_path):
    write_json(tmp_path / "t.json", {"task": "causal-lm", "test_perplexity": 3.5, "new": 1})
    write_json(tmp_path / "m/a.json", signal("hidden/10/int8-aa"))
    write_json(tmp_path / "m/b/c.json", signal("hidden/9/int8-aa", tokens=0))
    teacher = load_teacher("t", metrics=tmp_path / "t.json", manifests=tmp_path / "m")
    assert teacher.metrics.name == "t"
    assert [one.label for one in teacher.signals] == ["hidden/9/int8", "hidden/10/int8"]
    assert [one.bytes_per_token for one in teacher.signals] == [None, 4.0]
    assert teacher.metrics.model_dump()["new"] == 1


def test_a_curve_keeps_gaps_and_drops_what_no_plot_can_show(tmp_path):
    path = tmp_path / "s.csv"
    path.write_text("step,epoch,loss,output\n10,0.5,2.5,\n20,1.0,nan,0.25\n")
    curve = load_curve(path)
    assert curve.step == (10, 20)
    assert curve.terms == {"loss": (2.5, None), "output": (None, 0.25)}


def test_a_student_without_a_curve_has_none(tmp_path):
    write_json(tmp_path / "s.json", {"task": "causal-lm", "name": "s"})
    student = load_student("s", teacher="t", metrics=tmp_path / "s.json", curve=tmp_path / "no.csv")
    assert student.curve is None


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "found columns none, expected step"),
        ("epoch,loss\n1,2\n", "found columns epoch, loss, expected step"),
        ("step,loss\n1,high\n", "a cell is no number .*high"),
        ("step,loss\n1\n,3\n", "a cell is no number"),
    ],
)
def test_a_broken_curve_is_refused(tmp_path, text, match):
    path = tmp_path / "s.csv"
    path.write_text(text)
    with pytest.raises(IntegrityError, match=match):
        load_curve(path)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"task": "juggling"}, r"t\.json: task: .*found 'juggling'"),
        ({"task": "causal-lm", "parameters": "many"}, r"t\.json: parameters: "),
        ([1], r"t\.json: the whole file: "),
    ],
)
def test_metrics_of_another_shape_are_refused(tmp_path, value, match):
    write_json(tmp_path / "t.json", value)
    with pytest.raises(IntegrityError, match=match):
        load_teacher("t", metrics=tmp_path / "t.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(IntegrityError, match=r"corpus\.json: missing"):
        load_corpus(tmp_path / "corpus.json")


def stored(name, *, tokens=10, size=40, splits=("train",)):
    values = signal(name, tokens) | {"bytes": size, "splits": splits}
    return SignalResult(**values)


def test_signals_come_as_the_teacher_makes_them():
    names = ["logits/topk-aa", "value/9/int8-aa", "attention/10/qk-aa", "attention/9/qk-aa"]
    names.append("hidden/0/int8-aa")
    ordered = in_order([stored(name) for name in names])
    assert [one.signal for one in ordered] == names[::-1]


def test_names_are_short_unless_only_the_options_differ():
    two = [stored("logits/topk-aa"), stored("logits/topk-bb"), stored("hidden/1/int8-aa")]
    assert labels(two) == ["logits/topk-aa", "logits/topk-bb", "hidden/1/int8"]


def test_bytes_of_a_token_are_not_diluted_by_splits_that_lack_a_signal():
    signals = (stored("hidden/1/int8-aa", size=400), stored("logits/topk-aa", tokens=20, size=40))
    teacher = TeacherResult(
        name="t", metrics=ModelMetrics(name="t", task="causal-lm"), signals=signals
    )
    assert teacher.stored_bytes_per_token == 42.0


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("test_perplexity", '"40.0"'),
        ("test_new", '"40.0"'),
        ("test_new", "true"),
        ("test_new", "NaN"),
        ("test_intervals.bleu.1", '{"bleu": [1.0, "2"]}'),
        ("timing.length", '{"length": Infinity}'),
        ("parameters", '"5"'),
        ("agreement.kl", '{"kl": "0.1", "top1": 0.5}'),
    ],
)
def test_text_or_nothing_for_a_number_is_refused_with_file_and_key(tmp_path, key, value):
    path = tmp_path / "s.json"
    name = key.partition(".")[0]
    path.write_text(f'{{"task": "causal-lm", "{name}": {value}}}')
    with pytest.raises(IntegrityError, match=rf"s\.json: {re.escape(key)}: ") as caught:
        load_student("s", teacher="t", metrics=path)
    assert "\n" not in str(caught.value)
