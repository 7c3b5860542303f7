"""Every measure has a heading, a unit and a direction; every task a table."""

import pytest

from pipeline.report.compare import compare
from pipeline.report.grids import grids, signatures
from pipeline.report.measures import groups_of, measure_of, terminal_measures
from pipeline.report.results import StudentResult
from pipeline.scores.registry import scores_of
from pipeline.tasks import TASKS, generates
from tests.report.examples import VALUES, run_of


@pytest.mark.parametrize("task", TASKS)
def test_every_score_of_a_task_that_is_reported_is_shown(task):
    shown = {measure.key for group in groups_of(task) for measure in group.measures}
    assert shown == {name for name, score in scores_of(task).items() if not score.is_optional}
    assert set(terminal_measures(task)) <= shown
    for name, score in scores_of(task).items():
        assert measure_of(name, task).is_lower_better == score.lower_is_better


@pytest.mark.parametrize(
    ("key", "value", "shown", "bounds", "difference"),
    [
        ("accuracy", 0.8432, "84.3%", "[83.3, 85.3]", "+1.0"),
        ("bleu", 31.25, "31.2", "[30.2, 32.2]", "+1.0"),
        ("perplexity", 12.25, "12.25", "[12.24, 12.26]", "+0.01"),
        ("matthews", 0.5, "0.500", "[0.490, 0.510]", "+0.010"),
        ("cer", 1.25, "125.0%", "[124.0, 126.0]", "+1.0"),
    ],
)
def test_values_have_their_unit_and_intervals_go_without(key, value, shown, bounds, difference):
    tasks = [task for task in TASKS if key in scores_of(task)]
    measure = measure_of(key, tasks[0])
    step = 1.0 if key == "bleu" else 0.01
    assert measure.show(value) == shown
    assert measure.bounds((value - step, value + step)) == bounds
    assert measure.difference(step) == difference
    assert measure.difference(-step) == difference.replace("+", "−")
    assert measure.show(None) == "–"
    assert measure.bounds(None) == ""


def test_a_metric_that_is_not_known_is_a_plain_number():
    measure = measure_of("new_score", "classification", is_lower_better=True)
    assert (measure.heading, measure.show(0.5)) == ("new score", "0.500")
    assert measure.is_lower_better


def test_multi_label_names_what_it_counts():
    assert measure_of("accuracy", "multi-label").heading == "exact sets"
    assert measure_of("f1", "multi-label").heading == "micro F1"
    assert measure_of("accuracy", "classification").heading == "accuracy"


@pytest.mark.parametrize("task", VALUES)
def test_tables_hold_every_value_and_mark_the_best_student(task):
    comparison = compare(*run_of(task))
    found = grids(comparison)
    assert len(found) == (3 if generates(task) else 1)
    for grid in found:
        names = [line.name for line in grid.lines]
        if grid.group.against_teacher:
            assert names == ["aligned", "labels-only", "soft"]
            assert not grid.has_intervals
            assert not any(cell.is_best for line in grid.lines for cell in line.cells)
            continue
        assert names == ["big", "aligned", "labels-only", "soft"]
        assert grid.has_intervals
        for line in grid.lines:
            assert [cell.is_best for cell in line.cells] == [line.name == "aligned"] * len(
                grid.measures
            )


def test_what_nobody_measured_is_no_column_and_the_headline_alone_no_table():
    teachers, students = run_of("classification")
    kept = {"test_f1": None, "test_matthews": None, "test_ece": None}
    plain = [
        one.model_copy(update={"metrics": one.metrics.model_copy(update=kept)})
        for one in (*teachers, *students)
    ]
    assert grids(compare(plain[:1], plain[1:])) == []
    some = plain[1].metrics.model_copy(update={"test_ece": 0.1})
    odd = StudentResult(name="odd", teacher="big", metrics=some)
    (grid,) = grids(compare(plain[:1], [odd]))
    assert [measure.key for measure in grid.measures] == ["accuracy", "ece"]
    assert [line.cells[1].text for line in grid.lines] == ["–", "10.0%"]


def test_signatures_are_listed_once_and_all_where_they_differ():
    teachers, students = run_of("prompt-target")
    found = signatures(compare(teachers, students))
    assert set(found) == {"BLEU", "chrF"}
    assert found["BLEU"].count("nrefs") == 1
    old = students[0].metrics.model_copy(update={"signatures": {"bleu": "other"}})
    students[0] = students[0].model_copy(update={"metrics": old})
    assert signatures(compare(teachers, students))["BLEU"].endswith("; other")
