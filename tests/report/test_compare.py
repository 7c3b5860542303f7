"""Retention and ratios are the quotients they say, each against the student's own teacher."""

import pytest

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.report.compare import compare, report_metrics
from pipeline.report.results import ModelMetrics, StudentResult, TeacherResult
from tests.report.examples import classifier, metrics, student, teacher


def test_a_language_model_keeps_the_teachers_perplexity_over_its_own():
    comparison = compare([teacher()], [student("small", 80.0), student("twin", 40.0)])
    top, small, twin = comparison.rows
    assert (top.retention, top.size_ratio, top.speed_ratio) == (1.0, 1.0, 1.0)
    assert (small.retention, small.size_ratio, small.speed_ratio) == (0.5, 4.0, 2.5)
    assert twin.retention == 1.0
    assert comparison.best_student("big") == twin


@pytest.mark.parametrize(("score", "want"), [("accuracy", 0.875), ("f1", 0.75), ("matthews", None)])
def test_a_classifier_keeps_its_score_over_the_teachers(score, want):
    teachers = [TeacherResult(name="t", metrics=classifier("t", 0.8, 0.8, 0.0))]
    students = [StudentResult(name="s", teacher="t", metrics=classifier("s", 0.7, 0.6, 0.1))]
    row = compare(teachers, students, score=score).students[0]
    assert row.retention == (None if want is None else pytest.approx(want))


def test_each_student_stands_beside_its_own_teacher():
    wide = teacher("wide", metrics=metrics("wide", 20.0, 8_000_000, 500.0))
    comparison = compare([teacher(), wide], [student("a", of="wide"), student("b")])
    assert [row.name for row in comparison.rows] == ["big", "b", "wide", "a"]
    assert [row.retention for row in comparison.students] == [0.5, 0.25]
    report = report_metrics(comparison)
    assert report["teacher"]["name"] == "big"
    assert set(report["teachers"]) == {"big", "wide"}
    assert report["students"]["a"]["teacher"] == "wide"


def test_metrics_json_has_what_it_promises_and_no_nulls():
    report = report_metrics(compare([teacher()], [student("small")]))
    assert set(report) == {"teacher", "students"}
    assert report["teacher"]["test_perplexity"] == 40.0
    small = report["students"]["small"]
    assert small["test_perplexity"] == 80.0
    assert small["retention"] == 0.5
    assert small["parameters"] == 1_000_000
    assert small["agreement"] == {"kl": 0.25, "top1": 0.625}
    assert None not in small.values()
    assert "test_accuracy" not in small


def test_what_was_not_measured_is_unknown_not_wrong():
    bare = ModelMetrics(name="x", task="causal-lm")
    comparison = compare(
        [teacher(metrics=bare)], [StudentResult(name="s", teacher="big", metrics=bare)]
    )
    for row in comparison.rows:
        assert (row.quality, row.retention, row.size_ratio, row.speed_ratio) == (None,) * 4
    assert comparison.best_student("big") is None


def test_no_teacher_is_refused():
    with pytest.raises(ConfigError, match="teachers: found none, expected at least one"):
        compare([], [])


def test_two_students_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="students: found a twice"):
        compare([teacher()], [student("a"), student("a")])


def test_a_student_of_another_teacher_is_refused():
    with pytest.raises(IncompatibleError, match=r"students\.a\.teacher: found x, expected one of"):
        compare([teacher()], [student("a", of="x")])


def test_two_tasks_in_one_report_are_refused():
    odd = StudentResult(name="s", teacher="big", metrics=classifier("s", 0.7, 0.6, 0.1))
    with pytest.raises(IncompatibleError, match="s: found task classification, expected causal-lm"):
        compare([teacher()], [odd])
