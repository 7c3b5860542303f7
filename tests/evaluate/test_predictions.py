"""Prediction files: the same rows give the same bytes, and what is no row is named."""

import pytest

from pipeline.errors import IntegrityError
from pipeline.evaluate.predictions import read_predictions, score_rows, write_predictions
from pipeline.scores.metric import values

ROWS = [
    {"row": 0, "source_row": 4, "label": 1, "predicted": 1, "probability": 0.9},
    {"row": 1, "source_row": 2, "label": 0, "predicted": 1, "probability": 0.6},
]


def test_rows_come_back_and_the_order_of_keys_changes_no_byte(tmp_path):
    write_predictions(tmp_path / "a" / "one.jsonl", ROWS)
    write_predictions(tmp_path / "two.jsonl", [dict(reversed(row.items())) for row in ROWS])
    assert read_predictions(tmp_path / "a" / "one.jsonl") == ROWS
    assert (tmp_path / "a" / "one.jsonl").read_bytes() == (tmp_path / "two.jsonl").read_bytes()


def test_text_of_any_kind_stays_on_its_line(tmp_path):
    rows = [{"row": 0, "source_row": 0, "text": "a\nb\u2028c\r\x85d é"}]
    write_predictions(tmp_path / "p.jsonl", rows)
    assert read_predictions(tmp_path / "p.jsonl") == rows


def test_a_missing_file_and_a_broken_line_are_named(tmp_path):
    path = tmp_path / "p.jsonl"
    with pytest.raises(IntegrityError, match=r"p\.jsonl: missing; run the stage"):
        read_predictions(path)
    write_predictions(path, ROWS)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(IntegrityError, match=r"p\.jsonl: line 2 is no prediction"):
        read_predictions(path)
    path.write_text('{"row": 1}\n')
    with pytest.raises(IntegrityError, match="line 1 is no prediction"):
        read_predictions(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("nats", '"3.5"'),
        ("nats", "NaN"),
        ("targets", '"2"'),
        ("predicted", '"yes"'),
        ("probability", "Infinity"),
        ("probabilities", '[0.5, "0.5"]'),
        ("text", "7"),
        ("references", '["a", null]'),
        ("source_row", "true"),
    ],
)
def test_text_for_a_number_is_named_with_its_line_and_key(tmp_path, key, value):
    path = tmp_path / "p.jsonl"
    row = '{"row": 1, "source_row": 1'
    path.write_text(f'{row}}}\n{row}, "{key}": {value}}}\n')
    with pytest.raises(IntegrityError, match=rf"p\.jsonl: line 2 is no prediction: {key}"):
        read_predictions(path)


def test_a_class_stays_a_whole_number(tmp_path):
    write_predictions(tmp_path / "p.jsonl", ROWS)
    assert [type(row["predicted"]) for row in read_predictions(tmp_path / "p.jsonl")] == [int, int]


def test_a_row_without_what_a_score_needs_is_named():
    rows = [{"row": 0, "source_row": 0, "nats": 1.0, "targets": 2}, {"row": 7, "source_row": 1}]
    with pytest.raises(IntegrityError, match="row 7 has no nats, expected one in every row"):
        score_rows(rows, "causal-lm")


def test_two_classes_are_assumed_where_rows_show_one():
    (scored,) = score_rows(ROWS[:1], "classification")
    assert values(scored.metrics, 1)["f1"] == 1


def test_classes_that_no_row_shows_count_in_the_mean():
    (scored,) = score_rows(ROWS, "classification", classes=4)
    assert values(scored.metrics, 2)["f1"] == pytest.approx((2 / 3) / 4)


def test_rows_of_text_are_scored_beside_all_rows():
    rows = [
        {"row": 0, "source_row": 0, "nats": 3.0, "targets": 2, "references": ["a"], "text": "a"},
        {"row": 1, "source_row": 1, "nats": 1.0, "targets": 2},
    ]
    everything, written = score_rows(rows, "prompt-target")
    assert set(everything.metrics) == {"perplexity", "nats_per_token"}
    assert (len(everything.rows), len(written.rows)) == (2, 1)
    assert values(written.metrics, 1)["exact_match"] == 1
    assert set(written.signatures) == {"bleu", "chrf", "rouge"}
