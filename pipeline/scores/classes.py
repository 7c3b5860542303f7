"""Scores of one class per row: accuracy, F1, Matthews correlation, calibration error."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from pipeline.scores.metric import Floats, OfSums, divide, mean, mean_of
from pipeline.scores.score import Answers, Row, Score, column

BINS = 15


def calibration_error(confidence: Floats, correct: NDArray[np.bool_]) -> OfSums:
    """Return the expected calibration error (Guo et al., arXiv 1706.04599) in 15 equal bins.

    It is the mean, over decisions, of |accuracy - mean confidence| of their bin of confidence.

    With few rows a bin, it is overestimated, and by resamples more so: an interval may lie above
    the value.

    Args:
        confidence: Probability of what was decided, from 0 to 1: [rows, decisions].
        correct: Whether it was right, in the same shape.
    """
    # Bins are open below and closed above, as in the paper; 0 joins the first.
    bins = np.clip(np.ceil(confidence * BINS).astype(np.int64) - 1, 0, BINS - 1)
    gap = correct - confidence
    columns = np.stack([np.where(bins == b, gap, 0.0).sum(axis=1) for b in range(BINS)], axis=1)
    decisions = np.full((len(columns), 1), confidence.shape[1], dtype=np.float64)
    return OfSums(
        np.concatenate([columns, decisions], axis=1),
        lambda sums: divide(np.abs(sums[:, :BINS]).sum(axis=1), sums[:, BINS]),
    )


@dataclass(frozen=True)
class Classes(Answers):
    """Classes that a model chose.

    Attributes:
        labels: True class of each row.
        predicted: Class the model chose.
        probability: The probability it gave to the chosen class.
        classes: How many classes there are, whether or not all occur.
    """

    kind: ClassVar[str] = "classes"
    tasks: ClassVar[frozenset[str]] = frozenset({"classification"})

    labels: NDArray[np.int64]
    predicted: NDArray[np.int64]
    probability: Floats
    classes: int

    @classmethod
    def of_rows(cls, rows: Sequence[Row], *, classes: int | None, tokenizer: str) -> "Classes":
        """Return the classes chosen in these rows; without `classes`, at least two."""
        labels = column(rows, "label").astype(np.int64)
        predicted = column(rows, "predicted").astype(np.int64)
        largest = int(max(labels.max(), predicted.max()))
        return cls(labels, predicted, column(rows, "probability"), classes or max(2, largest + 1))

    @cached_property
    def is_right(self) -> NDArray[np.bool_]:
        """Whether each row's class is the true one."""
        return self.labels == self.predicted

    @cached_property
    def predicted_one_hot(self) -> Floats:
        """The chosen class of each row: [rows, classes]."""
        return one_hot(self.predicted, self.classes)

    @cached_property
    def true_one_hot(self) -> Floats:
        """The true class of each row: [rows, classes]."""
        return one_hot(self.labels, self.classes)


def f1_metric(predicted: Floats, true: Floats, *, only_second: bool = False) -> OfSums:
    """Return the plain mean of every class's F1, or that of class 1 alone.

    A class that is neither predicted nor true counts as 0.

    Args:
        predicted: One where the model predicts a class, else zero: [rows, classes].
        true: One where it is true, in the same shape.
        only_second: Whether only class 1 counts, as in yes and no.
    """
    classes = predicted.shape[1]
    kept = slice(1, 2) if only_second else slice(None)

    def value_of(sums: Floats) -> Floats:
        hits, either = sums[:, :classes], sums[:, classes:]
        return divide(2 * hits, either)[:, kept].mean(axis=1)

    return OfSums(np.concatenate([predicted * true, predicted + true], axis=1), value_of)


def one_hot(ids: NDArray[np.int64], classes: int) -> Floats:
    """Return a one in each row's class and zeros elsewhere: [rows, classes]."""
    return (ids[:, None] == np.arange(classes)).astype(np.float64)


def _accuracy(answers: Classes) -> OfSums:
    return mean(answers.is_right.astype(np.float64))


def _f1(answers: Classes) -> OfSums:
    """With two classes that of class 1; with more, the mean over classes."""
    return f1_metric(
        answers.predicted_one_hot, answers.true_one_hot, only_second=answers.classes == 2
    )


def _matthews(answers: Classes) -> OfSums:
    """For several classes as in Gorodkin, Comput. Biol. Chem. 28, 2004.

    It is 0 where only one class is predicted or true.
    """
    right = answers.is_right.astype(np.float64)[:, None]
    columns = np.concatenate([right, answers.predicted_one_hot, answers.true_one_hot], axis=1)
    classes = answers.classes

    def value_of(sums: Floats) -> Floats:
        right, predicted, true = sums[:, 0], sums[:, 1 : 1 + classes], sums[:, 1 + classes :]
        rows = predicted.sum(axis=1)
        covariance = right * rows - (predicted * true).sum(axis=1)
        spread = (rows**2 - (predicted**2).sum(axis=1)) * (rows**2 - (true**2).sum(axis=1))
        return divide(covariance, np.sqrt(np.maximum(spread, 0.0)))

    return OfSums(columns, value_of)


def _ece(answers: Classes) -> OfSums:
    return calibration_error(answers.probability[:, None], answers.is_right[:, None])


accuracy = Score(
    "accuracy",
    Classes,
    _accuracy,
    heading="accuracy",
    is_percent=True,
    is_default=True,
    in_terminal=Classes.tasks,
)
f1 = Score("f1", Classes, _f1, heading="F1", is_percent=True, in_terminal=Classes.tasks)
matthews = Score(
    "matthews", Classes, _matthews, heading="Matthews", digits=3, in_terminal=Classes.tasks
)
accuracy_f1 = Score(
    "accuracy_f1",
    Classes,
    lambda answers: mean_of(_accuracy(answers), _f1(answers)),
    heading="accuracy and F1",
    short="accuracy\nand F1",
    is_percent=True,
    is_optional=True,
)
ece = Score(
    "ece",
    Classes,
    _ece,
    heading="calibration error",
    short="ECE",
    is_percent=True,
    lower_is_better=True,
    in_terminal=Classes.tasks,
)
