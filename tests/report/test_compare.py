"""Retention and ratios are the quotients they say, each against the student's own teacher."""

import pytest

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.report.compare import compare, report_metrics
from pipeline.report.results import ModelMetrics, StudentResult, TeacherResult
from tests.report.examples import VALUES, classifier, metrics, run_of, student, teacher


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


@pytest.mark.parametrize("task", VALUES)
def test_every_task_is_judged_by_the_score_its_files_name(task):
    score, values = VALUES[task]
    comparison = compare(*run_of(task))
    assert comparison.headline.key == score
    assert comparison.is_lower_better == (score == "perplexity")
    first, second, third = comparison.students
    assert comparison.rows[0].quality == values[score]
    share = 1 / 1.1 if comparison.is_lower_better else 0.9
    assert [first.retention, second.retention] == pytest.approx([share, share**2])
    assert comparison.best_student("big") == first
    assert third.retention < second.retention


def judged(score, teachers, students, *, lower=False):
    def of(value, name):
        return ModelMetrics(
            name=name,
            task="prompt-target",
            score=score,
            lower_is_better=lower,
            test_score=value,
        )

    return compare(
        [TeacherResult(name="t", metrics=of(teachers, "t"))],
        [
            StudentResult(name=f"s{place}", teacher="t", metrics=of(value, f"s{place}"))
            for place, value in enumerate(students)
        ],
    )


@pytest.mark.parametrize(
    ("lower", "best", "values", "want"),
    [
        (False, 0.5, (0.25, 0.0, -0.25), (0.5, 0.0, None)),
        (False, -0.5, (0.25, -0.25), (None, None)),
        (False, 0.0, (0.25,), (None,)),
        (True, 0.25, (0.5, 0.25, 0.0), (0.5, 1.0, None)),
        (True, 0.0, (0.5, 0.0), (None, None)),
    ],
)
def test_there_is_no_share_of_what_is_not_positive(lower, best, values, want):
    comparison = judged("cer" if lower else "matthews", best, values, lower=lower)
    assert tuple(row.retention for row in comparison.students) == want
    found = comparison.best_student("t")
    assert found is not None
    assert found.quality == (min(values) if lower else max(values))


def test_a_score_that_is_new_here_is_shown_with_the_direction_its_file_names():
    comparison = judged("edit_cost", 2.0, (4.0, 1.0), lower=True)
    assert comparison.quality_name == "test edit cost"
    assert [row.retention for row in comparison.students] == [0.5, 2.0]


def test_models_judged_by_different_scores_are_refused():
    teachers, students = run_of("classification")
    odd = students[0].metrics.model_copy(update={"score": "f1"})
    with pytest.raises(IncompatibleError, match="aligned: found score f1, expected accuracy as of"):
        compare(teachers, [students[0].model_copy(update={"metrics": odd})])


def test_metrics_json_passes_on_intervals_signatures_and_what_is_new():
    teachers, students = run_of("prompt-target")
    new = students[0].metrics.model_copy(update={"test_new": 0.5})
    report = report_metrics(
        compare(teachers, [students[0].model_copy(update={"metrics": new}), *students[1:]])
    )
    aligned = report["students"]["aligned"]
    assert aligned["test_new"] == 0.5
    assert aligned["test_bleu"] == pytest.approx(28.125)
    assert set(aligned["test_intervals"]) == set(VALUES["prompt-target"][1])
    assert aligned["against_teacher"]["cer"] == pytest.approx(0.275)
    assert "version" in aligned["signatures"]["bleu"]
    assert "against_teacher" not in report["teacher"]
