"""The diagram of the run: one box per stage, with its numbers."""

from dataclasses import dataclass
from typing import TypeAlias

from pipeline.report import words
from pipeline.report.compare import Comparison
from pipeline.report.results import CorpusSummary, TeacherResult, TokensSummary

Facts: TypeAlias = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Box:
    """One stage of the flow.

    Attributes:
        stage: The stage's name.
        what: What it did, in a few words.
        facts: Number and unit of each of its results.
    """

    stage: str
    what: str
    facts: Facts


def flow(
    comparison: Comparison, teacher: TeacherResult, *, corpus: CorpusSummary | None
) -> list[Box]:
    """Describe the stages that led from the corpus to one teacher's students.

    Durations are not shown: DVC keeps none, and a stage that was not run again has none.

    Args:
        comparison: All models of the run.
        teacher: The teacher whose flow it is.
        corpus: What prepare made, where known.
    """
    students = [row for row in comparison.students if row.teacher == teacher.name]
    parameters = teacher.metrics.parameters
    return [
        Box("prepare", "text with fixed splits", _text(corpus)),
        Box("tokenize", "the teacher's tokens", _tokens(teacher.tokens)),
        Box(
            "teach",
            f"teacher {teacher.name}",
            ((words.count(parameters), "parameters"),) if parameters else (),
        ),
        *_written(teacher),
        Box("capture", "one pass, then the teacher rests", _captured(teacher)),
        Box(
            "train",
            "from the store alone",
            ((words.whole(len(students)), "student" if len(students) == 1 else "students"),),
        ),
        Box("evaluate", "on the test split", _best(comparison, teacher.name)),
    ]


def _text(corpus: CorpusSummary | None) -> Facts:
    """Return the facts of the corpus's text."""
    if corpus is None:
        return ()
    texts = (words.whole(sum(corpus.rows.values())), "texts")
    if not corpus.text_bytes:
        return (texts,)
    return texts, (words.data(sum(corpus.text_bytes.values())), "of text")


def _tokens(tokens: TokensSummary | None) -> Facts:
    """Return the facts of the tokens."""
    if tokens is None:
        return ()
    return (
        (words.count(sum(tokens.tokens.values())), "tokens"),
        (words.whole(sum(tokens.rows.values())), "rows"),
        (words.whole(tokens.vocab), "vocabulary"),
    )


def _written(teacher: TeacherResult) -> list[Box]:
    """Return the facts of generated targets; none if the teacher generated none."""
    transfer = teacher.transfer
    if transfer is None or transfer.targets == "corpus":
        return []
    facts = (
        (words.whole(transfer.rows), "targets"),
        (words.count(transfer.new_tokens), "tokens"),
    )
    return [Box("generate", "the teacher's own targets", facts)]


def _captured(teacher: TeacherResult) -> Facts:
    """Return the facts of the capture."""
    signals = teacher.signals
    if not signals:
        return (("0", "signals"),)
    return (
        (words.count(max(signal.tokens for signal in signals)), "tokens"),
        (words.data(sum(signal.bytes for signal in signals)), "in the store"),
        (words.whole(len(signals)), "signals" if len(signals) > 1 else "signal"),
        (words.whole(max(signal.segments for signal in signals)), "segments"),
    )


def _best(comparison: Comparison, teacher: str) -> Facts:
    """What evaluation found best: the retention, or else the quality, and size of the student."""
    best = comparison.best_student(teacher)
    if best is None:
        return ()
    kept = (
        (comparison.headline.show(best.quality), comparison.quality_name)
        if best.retention is None
        else (words.percent(best.retention), "of quality kept")
    )
    return (kept, (words.times(best.size_ratio), "smaller")) if best.size_ratio else (kept,)
