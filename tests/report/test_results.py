"""Files of other stages are read whole, or refused with their name and key."""

import pytest

from pipeline.errors import IntegrityError
from pipeline.provenance import write_json
from pipeline.report.results import load_corpus, load_curve, load_student, load_teacher


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
        ({"task": "regression"}, r"t\.json: task: .*found 'regression'"),
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
