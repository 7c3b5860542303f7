"""Samples to read side by side: the input, what was expected, and each model's answer.

Every text comes from the prediction files of the test split, joined by row and never by order.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from pipeline.report import words

Kind = Literal["input", "expected", "teacher", "student"]
Prediction: TypeAlias = dict[str, Any]

MAX_CHARACTERS = 600


@dataclass(frozen=True, slots=True)
class Part:
    """One line of a sample.

    Attributes:
        name: What it is: prompt, reference, or a model's name.
        texts: What it says; several references are several texts.
        kind: Whose text it is.
        note: A remark after it, in grey.
    """

    name: str
    texts: tuple[str, ...]
    kind: Kind
    note: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One test row with every model's answer.

    Attributes:
        teacher: Whose students answer.
        row: Row of the token set's test split.
        parts: Input, what was expected, teacher, students.
    """

    teacher: str
    row: int
    parts: tuple[Part, ...]


def shorten(text: str, limit: int = MAX_CHARACTERS) -> str:
    """Return a text without its middle if it has more than `limit` characters.

    The end of a prompt is kept, because a model continues it.
    """
    if len(text) <= limit:
        return text
    kept = (limit - 3) // 2
    return f"{text[:kept].rstrip()} … {text[-kept:].lstrip()}"


def generated_samples(
    teacher: str,
    teachers_rows: Sequence[Prediction] | None,
    students: Mapping[str, Sequence[Prediction]],
    *,
    count: int,
) -> list[Sample]:
    """Return the first rows that text was generated for.

    Args:
        teacher: The teacher's name.
        teachers_rows: Its predictions, where there are any.
        students: Those of its students, by name.
        count: How many rows at most.
    """
    answers = _by_row(teacher, teachers_rows, students, "text")
    found = []
    for row in sorted({row for answer in answers for row in answer.rows})[:count]:
        known = [(answer, answer.rows[row]) for answer in answers if row in answer.rows]
        asked = known[0][1]
        references = tuple(shorten(text) for text in asked.get("references", ()))
        parts = [
            Part("prompt", (shorten(asked.get("prompt", "")),), "input"),
            Part("reference" if len(references) < 2 else "references", references, "expected"),
        ]
        parts += [
            Part(model.name, (shorten(answer["text"]),), model.kind) for model, answer in known
        ]
        found.append(Sample(teacher, row, tuple(parts)))
    return found


def disagreements(
    teacher: str,
    teachers_rows: Sequence[Prediction] | None,
    students: Mapping[str, Sequence[Prediction]],
    *,
    texts: Mapping[int, tuple[str, ...]],
    classes: tuple[str, ...],
    count: int,
) -> list[Sample]:
    """Return the first test rows that models put into different classes.

    Args:
        teacher: The teacher's name.
        teachers_rows: Its predictions, where there are any.
        students: Those of its students, by name.
        texts: Text, or text and pair, by source row.
        classes: Class names in the order of their ids.
        count: How many rows at most.
    """
    answers = _by_row(teacher, teachers_rows, students, "predicted")
    shared = set.intersection(*(set(answer.rows) for answer in answers)) if answers else set()
    found: list[Sample] = []
    for row in sorted(shared):
        known = [(answer, answer.rows[row]) for answer in answers]
        asked = known[0][1]
        parted = len({answer["predicted"] for _, answer in known}) > 1
        if not parted or asked["source_row"] not in texts:
            continue
        names = ("text",) if len(texts[asked["source_row"]]) == 1 else ("first", "second")
        parts = [
            Part(name, (shorten(text),), "input")
            for name, text in zip(names, texts[asked["source_row"]], strict=True)
        ]
        parts.append(Part("class", (classes[asked["label"]],), "expected"))
        parts += [
            Part(
                model.name,
                (classes[answer["predicted"]],),
                model.kind,
                note=words.percent(answer.get("probability"))
                + ("" if answer["predicted"] == answer["label"] else ", wrong"),
            )
            for model, answer in known
        ]
        found.append(Sample(teacher, row, tuple(parts)))
        if len(found) == count:
            break
    return found


@dataclass(frozen=True, slots=True)
class _Answers:
    """One model's rows by their number; a student may have its teacher's name."""

    name: str
    kind: Kind
    rows: dict[int, Prediction]


def _by_row(
    teacher: str,
    teachers_rows: Sequence[Prediction] | None,
    students: Mapping[str, Sequence[Prediction]],
    key: str,
) -> list[_Answers]:
    """Return every model's rows that have an answer, the teacher first."""

    def answers(name: str, kind: Kind, rows: Sequence[Prediction]) -> _Answers:
        return _Answers(name, kind, {row["row"]: row for row in rows if key in row})

    found = [] if teachers_rows is None else [answers(teacher, "teacher", teachers_rows)]
    return found + [answers(name, "student", rows) for name, rows in students.items()]
