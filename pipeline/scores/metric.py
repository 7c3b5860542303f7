"""A metric is a function of how often each row counts.

With every row counted once it gives the metric's value; with the counts of a resample, one draw of
the bootstrap; with the rows of two models exchanged, one draw of a permutation test. Slow work
(n-grams, edit distances) is done once per row, when the metric is built.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Metric = Callable[[Floats], Floats]
"""Takes counts [draws, rows] and returns one value per draw."""


@dataclass(frozen=True, slots=True)
class OfSums:
    """A metric that depends only on column sums over the rows.

    Attributes:
        columns: What each row adds to each sum: [rows, columns].
        value_of: Takes the sums [draws, columns] and returns one value per draw.
    """

    columns: Floats
    value_of: Callable[[Floats], Floats]

    def __call__(self, counts: Floats) -> Floats:
        """Return the metric's value for each draw of counts [draws, rows]."""
        return self.value_of(counts @ self.columns)


def quotient(numerator: Floats, denominator: Floats) -> OfSums:
    """Return the metric that divides one sum by another; 0 where the divisor is 0."""
    columns = np.stack([numerator, denominator], axis=1)
    return OfSums(columns, lambda sums: divide(sums[:, 0], sums[:, 1]))


def mean(values: Floats) -> OfSums:
    """Return the metric that is the mean of one value per row."""
    return quotient(values, np.ones_like(values))


def mean_of(first: Metric, second: Metric) -> Metric:
    """Return the plain mean of two metrics, as GLUE combines them."""
    return lambda counts: (first(counts) + second(counts)) / 2


def divide(numerator: Floats, denominator: Floats) -> Floats:
    """Divide element by element; where the divisor is 0 or negative the result is 0."""
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1.0), 0.0)


def values(metrics: Mapping[str, Metric], rows: int) -> dict[str, float]:
    """Return the value of each metric with every row counted once."""
    once = np.ones((1, rows))
    return {name: float(metric(once)[0]) for name, metric in metrics.items()}
