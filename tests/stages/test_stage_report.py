"""report: students are tested against each other, and answers stand side by side."""

import json
import shutil
from pathlib import Path

import pytest

from pipeline.corpus.text.examples import CorpusMeta, Example, read_corpus_meta, write_corpus
from pipeline.provenance import read_json, write_json
from tests.cases import error_line, tiny_params, write_params

DATA = Path("data")
ROWS = 40
STUDENTS = ("soft", "aligned")


def answers(wrong_every):
    return [
        {
            "row": row,
            "source_row": row,
            "label": row % 2,
            "predicted": (row + (row % wrong_every == 0)) % 2,
            "probability": 0.75,
        }
        for row in range(ROWS)
    ]


def write_model(kind, name, accuracy, rows):
    metrics = {
        "name": name,
        "task": "classification",
        "score": "accuracy",
        "lower_is_better": False,
        "test_score": accuracy,
        "test_accuracy": accuracy,
        "test_intervals": {"accuracy": [accuracy - 0.1, accuracy + 0.1]},
    }
    write_json(DATA / "metrics" / kind / f"{name}.json", metrics)
    path = DATA / "predictions" / kind / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def measured(tmp_path, monkeypatch):
    """Enter a project of which only what was measured is there."""
    monkeypatch.chdir(tmp_path)
    write_params(tmp_path, tiny_params())
    counts = {"train": 0, "validation": 0, "test": ROWS}
    meta = CorpusMeta(
        task="classification",
        classes=("bad", "good"),
        has_pairs=False,
        rows=counts,
        text_bytes=counts,
        dropped={},
        splits=dict.fromkeys(counts, "official"),
        seed=0,
        source={"kind": "table"},
        digest="d",
    )
    texts = [Example(f"sentence {row}", label="bad", source_row=row) for row in range(ROWS)]
    write_corpus(DATA / "corpus" / "text", {"test": texts}, meta)
    tokens = {"vocab": 9, "max_length": 8, "rows": counts, "tokens": counts, "digest": "t"}
    write_json(DATA / "corpus" / "tokens" / "main" / "tokens.json", tokens)
    write_model("teachers", "main", 1.0, answers(ROWS + 1)[1:])
    write_model("students", "soft", 0.75, answers(4)[1:])
    write_model("students", "aligned", 0.9, answers(10)[1:])


def page():
    return (DATA / "reports" / "index.html").read_text(encoding="utf-8")


def test_students_are_tested_against_each_other_and_disagreements_are_shown(decant, measured):
    result = decant("report")
    assert result.exit_code == 0, result.output
    (pair,) = read_json(DATA / "reports" / "metrics.json")["pairs"]
    assert (pair["first"], pair["second"], pair["metric"]) == ("soft", "aligned", "accuracy")
    assert pair["difference"] == pytest.approx(pair["a"] - pair["b"])
    assert pair["low"] <= pair["difference"] <= pair["high"]
    assert pair["rows"] == ROWS - 1
    text = page()
    assert "Students against each other, test accuracy" in text
    assert text.count('<dl class="sample">') == 8
    assert "sentence 4<" in text
    assert "sentence 1<" not in text
    assert "95% interval" in text


def test_without_predictions_there_is_a_page_without_pairs(decant, measured):
    (DATA / "predictions" / "students" / "soft.jsonl").unlink()
    assert decant("report").exit_code == 0
    assert "pairs" not in read_json(DATA / "reports" / "metrics.json")
    assert "Students against each other" not in page()
    for path in (DATA / "predictions").rglob("*.jsonl"):
        path.unlink()
    assert decant("report").exit_code == 0
    assert "Where models disagree" not in page()


def test_students_that_answered_other_rows_are_not_compared(decant, measured):
    write_model("students", "soft", 0.75, answers(4)[2:])
    result = decant("report")
    assert result.exit_code == 0
    assert "pairs" not in read_json(DATA / "reports" / "metrics.json")


def test_no_samples_are_shown_where_none_are_asked_for(decant, measured):
    write_params(Path(), tiny_params() | {"evaluate": {"samples": 0}})
    assert decant("report").exit_code == 0
    assert "Where models disagree" not in page()


def test_a_signals_record_with_text_for_a_number_is_named(decant, measured):
    record = {"kind": "logits", "signal": "logits/dense-1", "form": "dense", "digest": "d"}
    path = DATA / "manifests" / "main" / "logits.json"
    write_json(path, record | {"store": "s", "tokens": "9", "segments": 1})
    result = decant("report")
    assert result.exit_code == 3
    assert "manifests/main/logits.json: tokens: Input should be a valid integer" in error_line(
        result
    )
    assert error_line(result).endswith("run `decant capture main`")


def test_controls_in_texts_reach_neither_page_nor_terminal(decant, measured):
    meta = read_corpus_meta(DATA / "corpus" / "text")
    meta = meta.model_copy(update={"classes": ("bad\x1b[2J", "good\0")})
    texts = [Example(f"\x1b[31msentence\0 {row}", source_row=row) for row in range(ROWS)]
    shutil.rmtree(DATA / "corpus" / "text")
    write_corpus(DATA / "corpus" / "text", {"test": texts}, meta)
    result = decant("report")
    assert result.exit_code == 0, result.output
    assert "␛[31msentence␀ 4" in page()
    assert not {"\x1b", "\0"} & {*page(), *result.output}


def test_all_models_that_were_not_evaluated_are_named_at_once(decant, measured):
    for name in STUDENTS:
        (DATA / "metrics" / "students" / f"{name}.json").unlink()
    result = decant("report")
    assert result.exit_code == 3
    assert error_line(result).endswith(
        "data/metrics/students/soft.json, data/metrics/students/aligned.json: missing; "
        "run `decant evaluate soft`, `decant evaluate aligned`"
    )
