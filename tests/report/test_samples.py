"""Answers stand beside what was asked, joined by row; long texts lose their middle."""

import pytest

from pipeline.report.samples import MAX_CHARACTERS, disagreements, generated_samples, shorten


def written(row, text, references=("r",)):
    return {
        "row": row,
        "source_row": row,
        "prompt": f"p{row}",
        "references": list(references),
        "text": text,
    }


def test_answers_are_joined_by_row_and_not_by_order():
    big = [written(0, "zero"), written(1, "one", ("r", "q")), {"row": 2, "nats": 1.0}]
    small = [{"row": 2, "nats": 1.0}, written(1, "eins"), written(0, "null")]
    first, second = generated_samples("big", big, {"big": small}, count=8)
    assert [(part.name, part.texts) for part in first.parts] == [
        ("prompt", ("p0",)),
        ("reference", ("r",)),
        ("big", ("zero",)),
        ("big", ("null",)),
    ]
    assert [part.kind for part in first.parts] == ["input", "expected", "teacher", "student"]
    assert second.parts[1].name == "references"
    assert second.parts[1].texts == ("r", "q")
    assert len(generated_samples("big", big, {}, count=1)) == 1
    assert generated_samples("big", None, {}, count=8) == []


def test_a_student_without_a_row_is_left_out_of_it():
    first, second = generated_samples(
        "big", [written(0, "a"), written(1, "b")], {"s": [written(1, "c")]}, count=8
    )
    assert len(first.parts) == 3
    assert len(second.parts) == 4


@pytest.mark.parametrize("length", [MAX_CHARACTERS, MAX_CHARACTERS + 1, 5000])
def test_a_long_text_keeps_its_start_and_its_end(length):
    text = "a" * (length // 2) + "z" * (length - length // 2)
    short = shorten(text)
    assert len(short) <= MAX_CHARACTERS
    assert (short == text) == (length <= MAX_CHARACTERS)
    assert short.startswith("aaa")
    assert short.endswith("zzz")


def classed(row, label, predicted):
    return {
        "row": row,
        "source_row": 10 + row,
        "label": label,
        "predicted": predicted,
        "probability": 0.75,
    }


def test_only_rows_that_models_disagree_about_are_shown():
    big = [classed(0, 1, 1), classed(1, 0, 0), classed(2, 1, 1), classed(3, 0, 1)]
    small = [classed(2, 1, 0), classed(1, 0, 0), classed(0, 1, 0), classed(3, 0, 0)]
    texts = {10: ("zero",), 11: ("one",), 12: ("two", "pair")}
    found = disagreements("big", big, {"s": small}, texts=texts, classes=("no", "yes"), count=5)
    assert [sample.row for sample in found] == [0, 2]
    names = [(part.name, part.texts, part.note) for part in found[1].parts]
    assert names == [
        ("first", ("two",), ""),
        ("second", ("pair",), ""),
        ("class", ("yes",), ""),
        ("big", ("yes",), "75.0%"),
        ("s", ("no",), "75.0%, wrong"),
    ]
    none = {"texts": texts, "classes": ("no", "yes")}
    assert len(disagreements("big", big, {"s": small}, count=1, **none)) == 1
    assert disagreements("big", None, {}, count=5, **none) == []
