"""compare: two models' scores on the same test rows, read from their predictions alone."""

import math
import re
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


def test_a_model_that_was_not_evaluated_is_told_the_command(decant, empty):
    result = decant("compare", "aligned", "main")
    assert result.exit_code == 2
    assert error_line(result).endswith("jsonl is missing; run `decant evaluate aligned`")
    model("students", "aligned", 0.9)
    result = decant("compare", "main", "aligned")
    assert error_line(result).endswith("jsonl is missing; run `decant evaluate-teacher main`")
    Path("data/predictions/students/aligned.jsonl").unlink()
    assert "no model was evaluated yet" in error_line(decant("compare", "other", "aligned"))


def language(name: str, nats: float, pieces: int, *, rows: int = 40, **asked) -> None:
    """Write what a language model leaves behind that has so many tokens a row."""
    found = [
        {"row": r, "source_row": r, "nats": nats + r, "targets": pieces, "words": 2, "bytes": 12}
        for r in range(rows)
    ]
    write_predictions(Path(f"data/predictions/students/{name}.jsonl"), found)
    facts = {"name": name, "task": "causal-lm", "score": "perplexity"} | asked
    write_json(Path(f"data/metrics/students/{name}.json"), facts)


def value_of(cell: str) -> float:
    """A number as the table has it; what is none is not a number."""
    found = re.fullmatch(r"([0-9.,]+(?:e[+-][0-9]+)?)([MB]?)", cell)
    factor = {"": 1, "M": 1e6, "B": 1e9}
    return math.nan if found is None else float(found[1].replace(",", "")) * factor[found[2]]


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.usefixtures("empty")
def test_every_number_is_whole_at_every_width(decant, monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    language("a-model-of-a-long-name", 40.0, 5)
    language("b[red]", 10.0, 5)
    result = decant("compare", "a-model-of-a-long-name", "b[red]")
    assert result.exit_code == 0, result.output
    text = result.output
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    assert "b[red]" in text
    for number in (math.exp(59.5 / 2), math.exp(29.5 / 2), 59.5 / 5, 59.5 / 12 / math.log(2)):
        known = {cell for line in text.splitlines() for cell in line.split()}
        assert any(math.isclose(number, value, rel_tol=5e-3) for value in map(value_of, known))
    # Names of scores take two lines only where there is no room.
    assert ("perplexity_per_word" in text) == (width >= 80)
    assert "40" in text.split()


@pytest.mark.usefixtures("empty")
def test_models_of_other_tokens_are_not_compared_by_the_token(decant):
    language("few", 20.0, 5)
    language("many", 20.0, 9)
    text = decant("compare", "few", "many").output
    assert list(lines(decant("compare", "few", "many"))) == [
        "bits_per_byte",
        "perplexity_per_word",
        "perplexity_per_byte",
    ]
    assert "not compared: perplexity, nats_per_token" in text


@pytest.mark.usefixtures("empty")
def test_two_rows_have_no_interval(decant):
    language("one", 20.0, 5, rows=2)
    language("two", 21.0, 5, rows=2)
    result = decant("compare", "one", "two")
    assert result.exit_code == 0
    assert lines(result)["bits_per_byte"][4] == "–"


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
