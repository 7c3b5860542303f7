"""A metric as a function of how often each row counts.

All ones give its value, the counts of a resample its bootstrap, the counts of swapped rows its
permutation test. What is slow, as n-grams and edits, is found once a row and never again.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Metric = Callable[[Floats], Floats]
"""From counts [draws, rows] to one value a draw."""


@dataclass(frozen=True, slots=True)
class OfSums:
    """A metric that is a function of column sums over the rows.

    Attributes:
        columns: What each row adds to each sum: [rows, columns].
        value_of: From the sums [draws, columns] to one value a draw.
    """

    columns: Floats
    value_of: Callable[[Floats], Floats]

    def __call__(self, counts: Floats) -> Floats:
        """Return the metric's value for each draw of counts [draws, rows]."""
        return self.value_of(counts @ self.columns)


def quotient(numerator: Floats, denominator: Floats) -> OfSums:
    """Return the metric that divides one sum by another; 0 where there is nothing to divide by."""
    columns = np.stack([numerator, denominator], axis=1)
    return OfSums(columns, lambda sums: divide(sums[:, 0], sums[:, 1]))


def mean_of(first: Metric, second: Metric) -> Metric:
    """Return the metric that is the plain mean of two, as GLUE combines them."""
    return lambda counts: (first(counts) + second(counts)) / 2


def divide(numerator: Floats, denominator: Floats) -> Floats:
    """Divide element by element; what is divided by 0 or less gives 0."""
    return np.where(denominator > 0, numerator / np.where(denominator > 0, denominator, 1.0), 0.0)


def values(metrics: Mapping[str, Metric], rows: int) -> dict[str, float]:
    """Return each metric's value where every row counts once."""
    once = np.ones((1, rows))
    return {name: float(metric(once)[0]) for name, metric in metrics.items()}
