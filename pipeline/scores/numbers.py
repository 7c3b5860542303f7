"""Scores of one number per row: Pearson and Spearman correlation, squared error.

A correlation with a constant is undefined; here it is 0.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.scores.metric import Floats, Metric, OfSums, divide, mean, mean_of
from pipeline.scores.score import Answers, Row, Score, column

logger = logging.getLogger(__name__)

CONSTANT = 1e-13
"""As in scipy: values that vary by less than this share of their size are a constant."""
ROUNDING = 1e-14
"""Rounding error of a variance computed from sums, as a share of the largest square."""


@dataclass(frozen=True)
class Numbers(Answers):
    """Numbers that a model predicted; if all are equal, a warning is logged.

    Attributes:
        targets: True number of each row.
        predicted: Number the model predicts.
    """

    kind: ClassVar[str] = "numbers"
    tasks: ClassVar[frozenset[str]] = frozenset({"regression"})

    targets: Floats
    predicted: Floats

    def __post_init__(self) -> None:
        if not _centred(self.predicted).any():
            logger.warning("every prediction is %.6g: correlations are 0", self.predicted[0])

    @classmethod
    def of_rows(cls, rows: Sequence[Row], *, classes: int | None, tokenizer: str) -> "Numbers":
        """Return the numbers predicted for these rows."""
        return cls(column(rows, "target"), column(rows, "predicted"))


def _pearson(x: Floats, y: Floats) -> OfSums:
    x, y = _centred(x), _centred(y)
    floors = ROUNDING * float((x * x).max()), ROUNDING * float((y * y).max())

    def value_of(sums: Floats) -> Floats:
        rows = sums[:, 0]
        mean_x, mean_y, xx, yy, xy = (divide(sums[:, c], rows) for c in range(1, 6))
        spread = _above(xx - mean_x**2, floors[0]) * _above(yy - mean_y**2, floors[1])
        return _correlation(xy - mean_x * mean_y, spread)

    return OfSums(np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1), value_of)


def _spearman(x: Floats, y: Floats) -> Metric:
    """Pearson's correlation of the ranks that the rows have among those that count."""
    rank_x, rank_y = _ranks_among(x), _ranks_among(y)

    def metric(counts: Floats) -> Floats:
        rows = counts.sum(axis=1, keepdims=True)
        # Whatever the ties, the mean of the ranks is the middle one.
        x_off, y_off = rank_x(counts) - (rows + 1) / 2, rank_y(counts) - (rows + 1) / 2
        xx, yy, xy = ((counts * p).sum(axis=1) for p in (x_off**2, y_off**2, x_off * y_off))
        return _correlation(xy, xx * yy)

    return metric


def _ranks_among(values: Floats) -> Callable[[Floats], Floats]:
    """Return the function from counts to each row's rank, equal values sharing their mean rank."""
    _, group, sizes = np.unique(values, return_inverse=True, return_counts=True)
    order = np.argsort(group, kind="stable")
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])

    def ranks(counts: Floats) -> Floats:
        here = np.add.reduceat(counts[:, order], starts, axis=1)
        before = np.cumsum(here, axis=1) - here
        return (before + (here + 1) / 2)[:, group]

    return ranks


def _above(variance: Floats, floor: float) -> Floats:
    return np.where(variance > floor, variance, 0.0)


def _correlation(together: Floats, spread: Floats) -> Floats:
    return np.clip(divide(together, np.sqrt(spread)), -1.0, 1.0)


def _centred(values: Floats) -> Floats:
    """Values less their mean, so that sums of squares keep their digits; 0 if they are constant."""
    off = values - values.mean()
    is_constant = np.abs(off).max() <= CONSTANT * np.abs(values).max()
    return np.zeros_like(off) if is_constant else off


pearson = Score(
    "pearson",
    Numbers,
    lambda answers: _pearson(answers.targets, answers.predicted),
    heading="Pearson",
    digits=3,
    is_default=True,
    in_terminal=Numbers.tasks,
)
spearman = Score(
    "spearman",
    Numbers,
    lambda answers: _spearman(answers.targets, answers.predicted),
    heading="Spearman",
    digits=3,
    in_terminal=Numbers.tasks,
)
mse = Score(
    "mse",
    Numbers,
    lambda answers: mean((answers.targets - answers.predicted) ** 2),
    heading="squared error",
    short="MSE",
    digits=3,
    lower_is_better=True,
    in_terminal=Numbers.tasks,
)
pearson_spearman = Score(
    "pearson_spearman",
    Numbers,
    lambda answers: mean_of(
        _pearson(answers.targets, answers.predicted), _spearman(answers.targets, answers.predicted)
    ),
    heading="Pearson and Spearman",
    short="Pearson,\nSpearman",
    digits=3,
    is_optional=True,
)
