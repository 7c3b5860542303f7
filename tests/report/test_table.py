"""The terminal's table names every model, fits 80 characters and takes names literally."""

import io

from rich.console import Console

from pipeline.report.compare import compare
from pipeline.report.results import StudentResult, TeacherResult
from pipeline.report.table import results_table
from tests.report.examples import classifier, student, teacher


def shown(comparison, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(results_table(comparison))
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
