"""Bootstrap confidence intervals: how a score would vary over other rows of the same kind.

Rows are drawn anew with replacement, as many as there are; the interval is between percentiles of
the scores of the resamples (Efron and Tibshirani, 1993). It does not cover the variation between
training seeds.
"""

from collections.abc import Iterator, Mapping

import numpy as np

from pipeline.evaluate.options import IntervalOptions
from pipeline.scores.metric import Floats, Metric

# 2^21 counts are 16 MiB.
CHUNK_CELLS = 1 << 21
FEWEST_ROWS = 5
"""Resamples of fewer rows are all alike: an interval of them looks sure where nothing is."""


def bootstrap_intervals(
    metrics: Mapping[str, Metric], rows: int, options: IntervalOptions
) -> dict[str, tuple[float, float]]:
    """Return the low and high end of each metric, all from the same resamples.

    With fewer than five rows there are no intervals.

    Args:
        metrics: Functions of counts over the same rows.
        rows: How many rows there are.
        options: How many resamples, their seed, and the confidence.
    """
    if rows < FEWEST_ROWS:
        return {}
    found: dict[str, list[Floats]] = {name: [] for name in metrics}
    for counts in resampled_counts(rows, options.resamples, np.random.default_rng(options.seed)):
        for name, metric in metrics.items():
            found[name].append(metric(counts))
    return {
        name: percentile_interval(np.concatenate(drawn), options.confidence)
        for name, drawn in found.items()
    }


def resampled_counts(rows: int, resamples: int, generator: np.random.Generator) -> Iterator[Floats]:
    """Yield how often each row is drawn in each resample: [some resamples, rows] at a time."""
    for some in chunk_sizes(rows, resamples):
        drawn = generator.integers(rows, size=(some, rows)) + rows * np.arange(some)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=some * rows)
        yield counts.reshape(some, rows).astype(np.float64)


def chunk_sizes(rows: int, draws: int) -> list[int]:
    """Return how many draws to hold at once, so that memory does not grow with their number."""
    most = max(1, CHUNK_CELLS // rows)
    return [min(most, draws - first) for first in range(0, draws, most)]


def percentile_interval(drawn: Floats, confidence: float) -> tuple[float, float]:
    """Return the percentiles that leave out as much below as above."""
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
