"""Students beside their teacher: retention, size ratio, speed ratio, and the report's metrics.

Retention is the share of the teacher's quality a student keeps. A language model's is the
teacher's test perplexity over the student's; a classifier's is the student's test score over the
teacher's. So 1 means "as good", and more than 1 "better".
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.report.results import ModelMetrics, StudentResult, Task, TeacherResult
from pipeline.report.words import Number
from pipeline.tasks import models_language

Score = Literal["accuracy", "f1", "matthews"]


@dataclass(frozen=True, slots=True)
class Row:
    """One model of the comparison; None where something was not measured.

    Attributes:
        name: The model's name.
        teacher: Its teacher's name; its own for a teacher.
        is_teacher: Whether it is one.
        metrics: What was measured of it.
        quality: Test perplexity, or the test score of the task.
        retention: Share of the teacher's quality, 1 for a teacher.
        size_ratio: The teacher's parameters over this model's.
        speed_ratio: This model's tokens a second over the teacher's.
    """

    name: str
    teacher: str
    is_teacher: bool
    metrics: ModelMetrics
    quality: float | None
    retention: float | None
    size_ratio: float | None
    speed_ratio: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """All rows of one task, teachers each followed by their students.

    Attributes:
        task: What the models do.
        score: Which score is a classifier's quality.
        rows: Models in the order given, students after their teacher.
    """

    task: Task
    score: Score
    rows: tuple[Row, ...]

    @property
    def quality_name(self) -> str:
        """What `Row.quality` is, as a heading."""
        names = {"accuracy": "test accuracy", "f1": "test F1", "matthews": "test Matthews"}
        return "test perplexity" if models_language(self.task) else names[self.score]

    @property
    def is_lower_better(self) -> bool:
        """Whether less of the quality is better."""
        return models_language(self.task)

    @property
    def students(self) -> tuple[Row, ...]:
        """The students' rows."""
        return tuple(row for row in self.rows if not row.is_teacher)

    def of_teacher(self, name: str) -> tuple[Row, ...]:
        """A teacher's row and its students'."""
        return tuple(row for row in self.rows if row.teacher == name)

    def best_student(self, teacher: str) -> Row | None:
        """The student of a teacher that keeps most, or None where none was measured."""
        known = [row for row in self.students if row.teacher == teacher and row.retention]
        return max(known, key=lambda row: row.retention or 0.0, default=None)


def compare(
    teachers: Sequence[TeacherResult],
    students: Sequence[StudentResult],
    *,
    score: Score = "accuracy",
) -> Comparison:
    """Set every student beside its teacher.

    Args:
        teachers: At least one.
        students: Any number.
        score: Which test score is a classifier's quality.

    Raises:
        ConfigError: If there is no teacher, or two models of one name.
        IncompatibleError: If a student names another teacher, or tasks differ.
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
    rows: list[Row] = []
    for teacher in teachers:
        best = _row(teacher.name, teacher.name, teacher.metrics, None, score)
        rows.append(best)
        rows += [
            _row(student.name, teacher.name, student.metrics, best, score)
            for student in students
            if student.teacher == teacher.name
        ]
    return Comparison(task=task, score=score, rows=tuple(rows))


def report_metrics(comparison: Comparison) -> dict[str, Any]:
    """Compose what `metrics.json` holds.

    Returns:
        `teacher`: the first teacher's metrics; `students`: by name, each student's metrics with
        `retention`, `size_ratio` and `speed_ratio`; and with several teachers `teachers`, by name.
        What was not measured is absent.
    """
    teachers: dict[str, dict[str, Any]] = {}
    students: dict[str, dict[str, Any]] = {}
    for row in comparison.rows:
        metrics = row.metrics.model_dump(mode="json", exclude_none=True)
        if row.is_teacher:
            teachers[row.name] = metrics
            continue
        ratios = {
            "retention": row.retention,
            "size_ratio": row.size_ratio,
            "speed_ratio": row.speed_ratio,
        }
        metrics |= {name: value for name, value in ratios.items() if value is not None}
        students[row.name] = metrics | {"teacher": row.teacher}
    report: dict[str, Any] = {"teacher": next(iter(teachers.values())), "students": students}
    if len(teachers) > 1:
        report["teachers"] = teachers
    return report


def _row(name: str, teacher: str, metrics: ModelMetrics, best: Row | None, score: Score) -> Row:
    """One row; `best` is the teacher's, None for the teacher itself."""
    lower_is_better = models_language(metrics.task)
    quality = metrics.test_perplexity if lower_is_better else getattr(metrics, f"test_{score}")
    if best is None:
        known = (quality, metrics.parameters, metrics.tokens_per_second)
        return Row(name, teacher, True, metrics, quality, *[_ratio(one, one) for one in known])
    retention = _ratio(best.quality, quality) if lower_is_better else _ratio(quality, best.quality)
    return Row(
        name=name,
        teacher=teacher,
        is_teacher=False,
        metrics=metrics,
        quality=quality,
        retention=retention,
        size_ratio=_ratio(best.metrics.parameters, metrics.parameters),
        speed_ratio=_ratio(metrics.tokens_per_second, best.metrics.tokens_per_second),
    )


def _ratio(above: Number | None, below: Number | None) -> float | None:
    """A quotient, or None where a side is unknown or the lower is not positive (Matthews 0)."""
    return None if above is None or below is None or below <= 0 else above / below
