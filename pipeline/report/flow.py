"""The pipeline as it ran: one box a stage, with its real numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.report import words
from pipeline.report.compare import Comparison
from pipeline.report.results import CorpusSummary, TeacherResult


@dataclass(frozen=True, slots=True)
class Box:
    """One stage of the flow.

    Attributes:
        stage: The stage's name.
        what: What it did, in a few words.
        facts: Number and unit of each thing it made.
    """

    stage: str
    what: str
    facts: tuple[tuple[str, str], ...]


def flow(
    comparison: Comparison,
    teacher: TeacherResult,
    *,
    corpus: CorpusSummary | None,
    seconds: Mapping[str, words.Number],
) -> list[Box]:
    """Describe the stages that led from the corpus to one teacher's students.

    Args:
        comparison: All models of the run.
        teacher: The teacher whose flow it is.
        corpus: What prepare made, where known.
        seconds: Duration of stages by their name (`prepare`, `tokenize@T`, `teach@T`,
            `capture@T`, `train@S`, `evaluate@S`), where known.
    """
    students = [row for row in comparison.students if row.teacher == teacher.name]

    def box(
        stage: str, what: str, facts: Sequence[tuple[str, str] | None], keys: Sequence[str]
    ) -> Box:
        took = [seconds[key] for key in keys if key in seconds]
        known = [fact for fact in facts if fact is not None]
        if took:
            known.append((words.seconds(sum(took)), "in all" if len(took) > 1 else "taken"))
        return Box(stage=stage, what=what, facts=tuple(known))

    name, metrics, tokens = teacher.name, teacher.metrics, teacher.tokens
    signals = teacher.signals
    return [
        box(
            "prepare",
            "text with fixed splits",
            []
            if corpus is None
            else [
                (words.whole(sum(corpus.rows.values())), "texts"),
                (words.data(sum(corpus.text_bytes.values())), "of text")
                if corpus.text_bytes
                else None,
            ],
            ["prepare"],
        ),
        box(
            "tokenize",
            "the teacher's tokens",
            []
            if tokens is None
            else [
                (words.count(sum(tokens.tokens.values())), "tokens"),
                (words.whole(sum(tokens.rows.values())), "rows"),
                (words.whole(tokens.vocab), "vocabulary"),
            ],
            [f"tokenize@{name}"],
        ),
        box(
            "teach",
            f"teacher {name}",
            [(words.count(metrics.parameters), "parameters") if metrics.parameters else None],
            [f"teach@{name}"],
        ),
        box(
            "capture",
            "one pass, then the teacher rests",
            [
                (words.count(max(signal.tokens for signal in signals)), "tokens"),
                (words.data(sum(signal.bytes for signal in signals)), "in the store"),
                (words.whole(len(signals)), "signals" if len(signals) > 1 else "signal"),
                (words.whole(max(signal.segments for signal in signals)), "segments"),
            ]
            if signals
            else [("0", "signals")],
            [f"capture@{name}"],
        ),
        box(
            "train",
            "from the store alone",
            [(words.whole(len(students)), "student" if len(students) == 1 else "students")],
            [f"train@{row.name}" for row in students],
        ),
        box("evaluate", "on the test split", _best(comparison, name), _evaluated(comparison, name)),
    ]


def _best(comparison: Comparison, teacher: str) -> list[tuple[str, str] | None]:
    """What evaluation found best: the retention and size of the student that keeps most."""
    best = comparison.best_student(teacher)
    if best is None:
        return []
    return [
        (words.percent(best.retention), "of quality kept"),
        (words.times(best.size_ratio), "smaller") if best.size_ratio else None,
    ]


def _evaluated(comparison: Comparison, teacher: str) -> list[str]:
    """The names under which evaluation of a teacher and its students may be timed."""
    return [f"evaluate-teacher@{teacher}"] + [
        f"evaluate@{row.name}" for row in comparison.students if row.teacher == teacher
    ]
