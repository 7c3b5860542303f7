"""Pearson and Spearman correlation and squared error of a number a row, as functions of counts."""

import logging
from collections.abc import Callable

import numpy as np

from pipeline.evaluate.scores.measure import Floats, Metric, OfSums, divide, mean_of, quotient

logger = logging.getLogger(__name__)

# As scipy: what varies by less than this share of its size is a constant, up to rounding.
CONSTANT = 1e-13
# Rounding of a variance from its sums, as a share of the largest square.
ROUNDING = 1e-14


def regression_metrics(targets: Floats, predicted: Floats) -> dict[str, Metric]:
    """Return `pearson`, `spearman`, `mse` and `pearson_spearman`, the mean of the first two.

    A correlation with a constant is not defined; here it is 0, and a model that says the same to
    every row is named in the log.

    Args:
        targets: True number of each row.
        predicted: Number the model says.
    """
    if not _centred(predicted).any():
        logger.warning("every prediction is %.6g: correlations are 0", predicted[0])
    pearson, spearman = _pearson(targets, predicted), _spearman(targets, predicted)
    return {
        "pearson": pearson,
        "spearman": spearman,
        "mse": quotient((targets - predicted) ** 2, np.ones_like(targets)),
        "pearson_spearman": mean_of(pearson, spearman),
    }


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
