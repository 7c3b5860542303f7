"""Compares students with their teacher: retention, size ratio, speed ratio, the report's metrics.

Retention is the share of the teacher's quality that a student keeps: the student's score over the
teacher's, or for scores such as perplexity, where less is better, the teacher's over the student's.
1 means as good as the teacher, more than 1 better. There is no retention if a score is not
positive, or if teacher or student is at chance: one class for every row keeps nothing.

Perplexity per token is comparable only between models with the same tokens. If some differ, all are
compared per byte.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.report.measures import Measure, across_tokenizers, measure_of
from pipeline.report.results import ModelMetrics, StudentResult, Task, TeacherResult
from pipeline.report.words import Number
from pipeline.scores.registry import headline as default_headline


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the comparison; None where something was not measured.

    Attributes:
        name: The model's name.
        teacher: Its teacher's name; its own for a teacher.
        is_teacher: Whether it is a teacher.
        metrics: Its metrics file.
        quality: The headline measure on the test split.
        retention: Share of the teacher's quality, 1 for a teacher.
        at_chance: Why its quality is no better than chance ("answers one class"); else empty.
        no_retention: Why there is no retention although the quality is known.
        size_ratio: The teacher's number of parameters divided by this model's.
        speed_ratio: This model's tokens per second divided by the teacher's; bytes per second if
            their tokens differ.
    """

    name: str
    teacher: str
    is_teacher: bool
    metrics: ModelMetrics
    quality: float | None
    retention: float | None
    size_ratio: float | None
    speed_ratio: float | None
    at_chance: str = ""
    no_retention: str = ""


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows of one task, teachers each followed by their students.

    Attributes:
        task: What the models do.
        headline: Which measure is their quality.
        rows: Models in the order given, students after their teacher.
        tokens_differ: Whether models have different tokens, so that measures per token are not
            comparable.
    """

    task: Task
    headline: Measure
    rows: tuple[Row, ...]
    tokens_differ: bool = False

    @property
    def quality_name(self) -> str:
        """The heading of `Row.quality`."""
        return f"test {self.headline.heading}"

    @property
    def is_lower_better(self) -> bool:
        """Whether less of the quality is better."""
        return self.headline.is_lower_better

    @property
    def students(self) -> tuple[Row, ...]:
        """The students' rows."""
        return tuple(row for row in self.rows if not row.is_teacher)

    def comparable(self, key: str) -> str:
        """Return the measure that is comparable in place of one per token."""
        return across_tokenizers(key, self.task) if self.tokens_differ else key

    def of_teacher(self, name: str) -> tuple[Row, ...]:
        """A teacher's row and its students'."""
        return tuple(row for row in self.rows if row.teacher == name)

    def best_student(self, teacher: str) -> Row | None:
        """Return the best student of a teacher; None if none is measured above chance."""
        known = [
            (-row.quality if self.is_lower_better else row.quality, row)
            for row in self.students
            if row.teacher == teacher and row.quality is not None and not row.at_chance
        ]
        return max(known, key=lambda pair: pair[0], default=(0.0, None))[1]


def compare(
    teachers: Sequence[TeacherResult],
    students: Sequence[StudentResult],
    *,
    score: str | None = None,
) -> Comparison:
    """Compare every student with its teacher.

    Args:
        teachers: At least one.
        students: Any number.
        score: Which test metric is the quality; by default what the metrics files say, or where
            they say nothing the task's own.

    Raises:
        ConfigError: If there is no teacher, or two models of one name.
        IncompatibleError: If a student names another teacher, or tasks or scores differ.
    """
    if not teachers:
        raise ConfigError("teachers: found none, expected at least one; add one under teachers")
    for kind, names in {
        "teachers": [teacher.name for teacher in teachers],
        "students": [student.name for student in students],
    }.items():
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ConfigError(
                f"{kind}: found {twice[0]} twice, expected each name once; rename one"
            )
    task = teachers[0].metrics.task
    known = [teacher.name for teacher in teachers]
    for student in students:
        if student.teacher not in known:
            raise IncompatibleError(
                f"students.{student.name}.teacher: found {student.teacher}, expected one of "
                f"{', '.join(known)}; correct the name"
            )
    for model in (*teachers, *students):
        if model.metrics.task != task:
            raise IncompatibleError(
                f"{model.name}: found task {model.metrics.task}, expected {task} as of "
                f"{teachers[0].name}; report one task at a time"
            )
    tokens_differ = _tokens_differ([model.metrics for model in (*teachers, *students)])
    headline = _headline([*teachers, *students], score, tokens_differ)
    rows: list[Row] = []
    for teacher in teachers:
        best = _row(teacher.name, teacher.name, teacher.metrics, None, headline, tokens_differ)
        rows.append(best)
        rows += [
            _row(student.name, teacher.name, student.metrics, best, headline, tokens_differ)
            for student in students
            if student.teacher == teacher.name
        ]
    return Comparison(task, headline, tuple(rows), tokens_differ)


def report_metrics(comparison: Comparison) -> dict[str, Any]:
    """Return the content of `metrics.json`.

    Returns:
        `teacher`: the first teacher's metrics; `students`: by name, each student's metrics with
        `retention`, or `no_retention`, which says why there is none, `size_ratio` and
        `speed_ratio`; with several teachers `teachers`, by name; and `compared_by` where that is
        not the score of the metrics files. What was not measured is absent.
    """
    teachers: dict[str, dict[str, Any]] = {}
    students: dict[str, dict[str, Any]] = {}
    for row in comparison.rows:
        dumped = row.metrics.model_dump(mode="json", exclude_none=True)
        metrics = {key: value for key, value in dumped.items() if value not in ({}, [])}
        if row.is_teacher:
            teachers[row.name] = metrics
            continue
        ratios = {
            "retention": row.retention,
            "size_ratio": row.size_ratio,
            "speed_ratio": row.speed_ratio,
            "no_retention": row.no_retention or None,
        }
        metrics |= {name: value for name, value in ratios.items() if value is not None}
        students[row.name] = metrics | {"teacher": row.teacher}
    report: dict[str, Any] = {"teacher": next(iter(teachers.values())), "students": students}
    if len(teachers) > 1:
        report["teachers"] = teachers
    if comparison.tokens_differ:
        report["compared_by"] = comparison.headline.key
    return report


def _tokens_differ(models: Sequence[ModelMetrics]) -> bool:
    """Tell whether some models have other ids, or score the test rows in another number of them."""
    vocabs = {model.vocab for model in models} - {None}
    known = [ratio for model in models if (ratio := model.tokens_per_byte) is not None]
    return len(vocabs) > 1 or not all(math.isclose(one, known[0], rel_tol=1e-6) for one in known)


def _headline(
    models: Sequence[TeacherResult | StudentResult], score: str | None, tokens_differ: bool
) -> Measure:
    """Return the measure that all models are judged by."""
    said = {model.metrics.score: model for model in models if model.metrics.score is not None}
    if score is None and len(said) > 1:
        first, second = list(said)[:2]
        raise IncompatibleError(
            f"{said[second].name}: found score {second}, expected {first} as of "
            f"{said[first].name}; evaluate all models with one evaluate.score"
        )
    task = models[0].metrics.task
    score = score or next(iter(said), None) or default_headline(task, None)
    known = said.get(score)
    if tokens_differ:
        score = across_tokenizers(score, task)
    return measure_of(
        score, task, is_lower_better=None if known is None else known.metrics.lower_is_better
    )


def _row(
    name: str,
    teacher: str,
    metrics: ModelMetrics,
    best: Row | None,
    headline: Measure,
    tokens_differ: bool,
) -> Row:
    """Return a model's row; `best` is its teacher's row, None for a teacher."""
    quality = metrics.test(headline.key)
    at_chance = metrics.at_chance
    if best is None:
        size, speed = (_ratio(x, x) for x in (metrics.parameters, metrics.tokens_per_second))
        kept = None if at_chance else _ratio(quality, quality)
        return Row(name, teacher, True, metrics, quality, kept, size, speed, at_chance, at_chance)
    no_retention = at_chance or ("teacher at chance" if best.at_chance else "")
    kept = (
        _ratio(best.quality, quality) if headline.is_lower_better else _ratio(quality, best.quality)
    )
    # A teacher without errors leaves nothing to divide by.
    if no_retention or (headline.is_lower_better and best.quality == 0):
        kept = None
    return Row(
        name=name,
        teacher=teacher,
        is_teacher=False,
        metrics=metrics,
        quality=quality,
        retention=kept,
        size_ratio=_ratio(best.metrics.parameters, metrics.parameters),
        speed_ratio=_ratio(_speed(metrics, tokens_differ), _speed(best.metrics, tokens_differ)),
        at_chance=at_chance,
        no_retention=no_retention,
    )


def _speed(metrics: ModelMetrics, tokens_differ: bool) -> float | None:
    """Return tokens per second, or bytes if tokens differ; None if unknown."""
    return (
        _ratio(metrics.tokens_per_second, metrics.tokens_per_byte)
        if tokens_differ
        else metrics.tokens_per_second
    )


def _ratio(above: Number | None, below: Number | None) -> float | None:
    """A quotient, or None where a side is unknown or the signs give none (Matthews 0, or less)."""
    if above is None or below is None or below <= 0 or above < 0:
        return None
    return above / below
