"""compare: two models' scores on the same test rows, read from their predictions alone."""

from pathlib import Path

import numpy as np
import pytest

from pipeline.evaluate.predictions import write_predictions
from pipeline.provenance import write_json
from tests.cases import error_line

ROWS = 80


def model(group: str, name: str, share: float, *, seed: int = 0, first: int = 0, **metrics) -> None:
    """Write what a classifier that is right so often leaves behind."""
    draw = np.random.default_rng(seed)
    labels = np.random.default_rng(99).integers(2, size=ROWS)
    rows = [
        {
            "row": row,
            "source_row": first + row,
            "label": int(label),
            "predicted": int(label if draw.random() < share else 1 - label),
            "probability": 0.75,
        }
        for row, label in enumerate(labels)
    ]
    write_predictions(Path("data/predictions") / group / f"{name}.jsonl", rows)
    facts = {"name": name, "task": "classification", "classes": 2, "score": "accuracy"} | metrics
    write_json(Path("data/metrics") / group / f"{name}.json", facts)


def lines(result) -> dict[str, list[str]]:
    """Return the cells of each score's line."""
    split = [line.split() for line in result.output.splitlines()]
    return {cells[0]: cells[1:] for cells in split if len(cells) > 1 and cells[1] in "↑↓"}


@pytest.fixture
def three(empty: Path) -> None:
    model("students", "good", 0.95)
    model("students", "poor", 0.55, seed=1)
    model("teachers", "main", 0.97, seed=2)


@pytest.mark.usefixtures("three")
def test_every_score_is_shown_with_its_difference_and_p(decant, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    result = decant("compare", "good", "poor")
    assert result.exit_code == 0, result.output
    table = lines(result)
    assert list(table) == ["accuracy", "f1", "matthews", "ece"]
    arrow, good, poor, difference, low, high, p, rows = table["accuracy"]
    assert arrow == "↑"
    assert float(difference) == pytest.approx(float(good) - float(poor), abs=1e-3)
    assert 0 < float(low.strip("[,")) < float(difference) < float(high.strip("]"))
    assert float(p) < 0.05
    assert rows == str(ROWS)
    assert table["ece"][0] == "↓"


@pytest.mark.usefixtures("three")
def test_a_teacher_compares_with_its_student(decant):
    result = decant("compare", "good", "main", "--metric", "cola")
    assert result.exit_code == 0, result.output
    assert list(lines(result)) == ["matthews"]


@pytest.mark.usefixtures("three")
def test_a_name_that_is_both_is_the_students(decant):
    model("students", "main", 0.5, seed=3)
    assert decant("compare", "main", "poor").exit_code == 0
    own, other = (lines(decant("compare", "main", name)) for name in ("main", "poor"))
    assert own["accuracy"][3] == "+0"
    assert own["accuracy"][1] == other["accuracy"][1]
    assert float(own["accuracy"][1]) < 0.7


@pytest.mark.usefixtures("three")
def test_a_combined_score_is_shown_where_models_are_judged_by_it(decant):
    model("students", "judged", 0.9, score="accuracy_f1")
    assert next(iter(lines(decant("compare", "judged", "poor")))) == "accuracy_f1"


@pytest.mark.usefixtures("three")
def test_a_name_without_predictions_is_told_which_there_are(decant):
    result = decant("compare", "good", "bad")
    assert result.exit_code == 2
    assert "bad: no predictions of such a student or teacher" in error_line(result)
    assert "good, main, poor" in error_line(result)


@pytest.mark.usefixtures("three")
def test_models_of_other_rows_or_tasks_do_not_compare(decant):
    model("students", "moved", 0.9, first=1)
    result = decant("compare", "good", "moved")
    assert result.exit_code == 4
    assert "expected the same rows of one test split" in error_line(result)
    model("students", "lm", 0.9, task="causal-lm", score="perplexity")
    result = decant("compare", "good", "lm")
    assert result.exit_code == 4
    assert "good is a model of the task classification, lm of causal-lm" in error_line(result)


@pytest.mark.usefixtures("three")
def test_a_score_of_another_task_is_refused(decant):
    result = decant("compare", "good", "poor", "--metric", "bleu")
    assert result.exit_code == 2
    assert "found 'bleu', the task classification has accuracy" in error_line(result)
