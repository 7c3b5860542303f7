"""Expected calibration error: how far a model's confidence is from how often it is right.

Guo et al., On Calibration of Modern Neural Networks, arXiv 1706.04599: decisions are binned by
confidence; the error is the mean, over decisions, of their bin's |accuracy - mean confidence|.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.scores.metric import Floats, OfSums, divide

BINS = 15


def calibration_error(confidence: Floats, correct: NDArray[np.bool_]) -> OfSums:
    """Return the expected calibration error in 15 bins of equal width.

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
