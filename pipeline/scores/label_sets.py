"""Scores of any number of classes per row, each decided by itself at a probability of one half."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.scores.classes import calibration_error, f1_metric
from pipeline.scores.metric import Floats, OfSums, mean, quotient
from pipeline.scores.score import Answers, Row, Score, column

THRESHOLD = 0.5


@dataclass(frozen=True)
class LabelSets(Answers):
    """Sets of classes that a model chose.

    Attributes:
        targets: One where a class is true, else zero: [rows, classes].
        probabilities: The probability the model gave to each class, in the same shape.
    """

    kind: ClassVar[str] = "label_sets"
    tasks: ClassVar[frozenset[str]] = frozenset({"multi-label"})

    targets: Floats
    probabilities: Floats

    @classmethod
    def of_rows(cls, rows: Sequence[Row], *, classes: int | None, tokenizer: str) -> "LabelSets":
        """Return the sets chosen in these rows."""
        return cls(column(rows, "targets"), column(rows, "probabilities"))

    @cached_property
    def predicted(self) -> Floats:
        """One where the model decides for a class, else zero: [rows, classes]."""
        return (self.probabilities >= THRESHOLD).astype(np.float64)

    @cached_property
    def is_right(self) -> NDArray[np.bool_]:
        """Whether each decision is right: [rows, classes]."""
        return self.predicted == self.targets


def _micro_f1(answers: LabelSets) -> OfSums:
    predicted, targets = answers.predicted, answers.targets
    return quotient(2 * (predicted * targets).sum(axis=1), (predicted + targets).sum(axis=1))


def _ece(answers: LabelSets) -> OfSums:
    confidence = np.maximum(answers.probabilities, 1 - answers.probabilities)
    return calibration_error(confidence, answers.is_right)


accuracy = Score(
    "accuracy",
    LabelSets,
    lambda answers: mean(answers.is_right.all(axis=1).astype(np.float64)),
    heading="exact sets",
    short="exact",
    is_percent=True,
    in_terminal=LabelSets.tasks,
)
f1 = Score(
    "f1",
    LabelSets,
    _micro_f1,
    heading="micro F1",
    short="micro\nF1",
    is_percent=True,
    is_default=True,
    in_terminal=LabelSets.tasks,
)
f1_macro = Score(
    "f1_macro",
    LabelSets,
    lambda answers: f1_metric(answers.predicted, answers.targets),
    heading="macro F1",
    short="macro\nF1",
    is_percent=True,
    in_terminal=LabelSets.tasks,
)
ece = Score(
    "ece",
    LabelSets,
    _ece,
    heading="calibration error",
    short="ECE",
    is_percent=True,
    lower_is_better=True,
    in_terminal=LabelSets.tasks,
)
