"""The terminal's table names every model, fits 80 characters and takes names literally."""

import io

import pytest
from rich.console import Console

from pipeline.report.compare import compare
from pipeline.report.results import StudentResult, TeacherResult
from pipeline.report.table import results_table
from tests.report.examples import VALUES, classifier, run_of, student, teacher


def shown(comparison, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(results_table(comparison, width=width))
    return console.file.getvalue()


def test_every_model_and_its_numbers_fit_a_pipe():
    students = [student("labels-only", 183.21), student("aligned-small", 65.4)]
    text = shown(compare([teacher()], students))
    assert "big (teacher)" in text
    (labels,) = [line for line in text.splitlines() if "labels-only" in line]
    assert labels.split() == [
        *("labels-only", "183.21", "21.8%", "0.250", "62.5%"),
        *("1", "M", "4.0×", "2.50", "K", "2.5×", "12.5", "ms"),
    ]
    (aligned,) = [line for line in text.splitlines() if "aligned-small" in line]
    assert "61.2%" in aligned
    assert "★" in text
    assert "…" not in text


def test_columns_that_nothing_was_measured_for_are_left_out():
    text = shown(compare([TeacherResult(name="t", metrics=classifier("t", 0.885, 0.8, 0.7))], []))
    assert "88.5%" in text
    assert "accuracy" in text
    for absent in ("KL ", "params", "latency", "★ "):
        assert absent not in text.splitlines()[1]


def test_a_name_with_brackets_is_not_markup():
    odd = StudentResult(name="[red]x", teacher="t", metrics=classifier("x", 0.5, 0.5, 0.1))
    teachers = [TeacherResult(name="t", metrics=classifier("t", 0.8, 0.8, 0.5))]
    assert "[red]x" in shown(compare(teachers, [odd]))


@pytest.mark.parametrize("task", VALUES)
def test_every_task_fits_a_pipe_and_uses_a_wider_line(task):
    comparison = compare(*run_of(task))
    narrow, wide = (shown(comparison, width) for width in (80, 140))
    for text in (narrow, wide):
        assert "…" not in text
        assert "aligned ★" in text
    assert comparison.headline.show(comparison.students[1].quality) in narrow
    assert len(wide.splitlines()[3].split()) >= len(narrow.splitlines()[3].split())


def test_a_translators_line_has_three_more_measures_where_there_is_room():
    wide = shown(compare(*run_of("prompt-target")), 140)
    assert "ROUGE-L" in wide
    assert "CER" in wide
    assert "ppl" in wide


@pytest.mark.parametrize("width", [40, 60, 80, 120])
@pytest.mark.parametrize("task", VALUES)
def test_no_number_is_cut_off_at_any_width(task, width):
    comparison = compare(*run_of(task))
    text = shown(comparison, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert ("params" in text) == (width > 60)
    for row in comparison.rows:
        assert comparison.headline.show(row.quality) in text
        assert f"{100 * row.retention:.1f}%" in text
    # What is given up last.
    assert "smaller" in text or width == 40
