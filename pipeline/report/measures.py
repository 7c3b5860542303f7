"""Metrics as people read them: the plain numbers of metrics files become "84.3%" or "12.07"."""

from dataclasses import dataclass

from pipeline.report import words
from pipeline.report.words import Number
from pipeline.scores.classes import Classes
from pipeline.scores.label_sets import LabelSets
from pipeline.scores.likelihood import Likelihood
from pipeline.scores.registry import scores_of
from pipeline.scores.score import Answers, Score
from pipeline.scores.text import GeneratedText


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric as a column.

    Attributes:
        key: Its name in a metrics file, without the split.
        heading: The heading of the column.
        digits: Decimals shown.
        is_percent: Whether a share of one is shown in percent.
        is_lower_better: Whether less is better.
        short: The heading in the terminal; by default the same.
    """

    key: str
    heading: str
    digits: int = 1
    is_percent: bool = True
    is_lower_better: bool = False
    short: str = ""

    def show(self, value: Number | None) -> str:
        """Return a value with its unit."""
        if self.is_percent and self.digits == 1:
            return words.percent(value)
        return words.number(value, self.digits)

    def bounds(self, interval: tuple[Number, Number] | None) -> str:
        """Return an interval in brackets, without the unit; empty if unknown."""
        if interval is None:
            return ""
        factor = 100 if self.is_percent else 1
        low, high = (words.number(factor * bound, self.digits) for bound in interval)
        return f"[{low}, {high}]"

    def difference(self, value: Number) -> str:
        """Return a signed difference; of percentages in points."""
        factor = 100 if self.is_percent else 1
        text = words.number(factor * value, self.digits)
        return text if value <= 0 else f"+{text}"


@dataclass(frozen=True, slots=True)
class Group:
    """Measures in one table.

    Attributes:
        title: What the table is about.
        note: How to read it.
        measures: Its columns, in order.
        against_teacher: Whether the values compare with the teacher's own output.
    """

    title: str
    note: str
    measures: tuple[Measure, ...]
    against_teacher: bool = False


# Guo et al., arXiv 1706.04599.
CALIBRATION = (
    "The calibration error is the mean distance between how sure a model is and how often it is "
    "right, over bins of confidence."
)
GROUPS: dict[type[Answers], tuple[str, str]] = {
    GeneratedText: (
        "Generated text against the references",
        "BLEU and chrF from 0 to 100. CER and WER are edits over the reference's length, less is "
        "better; they may pass 100%.",
    ),
    Likelihood: (
        "Language modelling",
        "Perplexity a token depends on the tokenizer; a word and a byte are the same for all.",
    ),
    Classes: ("Measures", CALIBRATION),
    LabelSets: ("Measures", CALIBRATION),
}
"""Title and note of the table of each sort of answers, in the order of the tables."""
AGAINST_TEACHER = (
    "Generated text against the teacher's own",
    "The same measures with the teacher's text as the reference: how much a student writes like "
    "its teacher.",
)


def measure_of(key: str, task: str, *, is_lower_better: bool | None = None) -> Measure:
    """Return a metric as a column; an unknown one is shown as a plain number.

    Args:
        key: The metric, such as `accuracy`.
        task: The task of the models.
        is_lower_better: The direction that the metrics file gives for an unknown metric.
    """
    score = scores_of(task).get(key)
    if score is None:
        return Measure(key, key.replace("_", " "), 3, False, bool(is_lower_better))
    return _measure(score)


def _measure(score: Score) -> Measure:
    return Measure(
        key=score.name,
        heading=score.heading,
        digits=score.digits,
        is_percent=score.is_percent,
        is_lower_better=score.lower_is_better,
        short=score.short,
    )


def across_tokenizers(key: str, task: str) -> str:
    """Return the metric that compares models in place of `key` where their tokenizers differ."""
    score = scores_of(task).get(key)
    return (score.across_tokenizers if score else "") or key


def terminal_measures(task: str) -> list[str]:
    """Return the metrics for a terminal's narrow table, the first ones first to be shown."""
    return [score.name for score in _by_group(task) if task in score.in_terminal]


def groups_of(task: str) -> list[Group]:
    """Return the tables of a task's measures."""
    tables: dict[type[Answers], list[Measure]] = {}
    for score in _by_group(task):
        if not score.is_optional:
            tables.setdefault(score.answers, []).append(_measure(score))
    groups: list[Group] = []
    for answers, measures in tables.items():
        title, note = GROUPS.get(answers, ("Measures", ""))
        groups.append(Group(title, note, tuple(measures)))
        if answers is GeneratedText:
            groups.append(Group(*AGAINST_TEACHER, tuple(measures), against_teacher=True))
    return groups


def _by_group(task: str) -> list[Score]:
    order = list(GROUPS)
    return sorted(
        scores_of(task).values(),
        key=lambda score: order.index(score.answers) if score.answers in order else len(order),
    )
