"""Accuracy, F1, Matthews correlation and calibration of one class a row, as functions of counts.

Written as sums over rows, so that thousands of resamples cost one matrix product.
"""

import numpy as np
from numpy.typing import NDArray

from pipeline.evaluate.scores.calibration import calibration_error
from pipeline.evaluate.scores.measure import Floats, Metric, OfSums, divide, mean_of, quotient


def classification_metrics(
    labels: NDArray[np.int64],
    predicted: NDArray[np.int64],
    probability: Floats,
    classes: int,
) -> dict[str, Metric]:
    """Return `accuracy`, `f1`, `matthews`, `ece` and `accuracy_f1`, the mean of the first two.

    With two classes F1 is that of class 1; with more, the plain mean of every class's, and a class
    that is neither said nor true counts as 0. Matthews' correlation of several classes is as of
    Gorodkin (Comput. Biol. Chem. 28, 2004); it is 0 where only one class is said or true.

    Args:
        labels: True class of each row.
        predicted: Class the model says.
        probability: The model's probability of the class it says.
        classes: How many classes there are, whether or not all occur.
    """
    right = (labels == predicted).astype(np.float64)
    said = one_hot(predicted, classes)
    true = one_hot(labels, classes)
    accuracy = quotient(right, np.ones_like(right))
    f1 = f1_metric(said, true, only_second=classes == 2)
    return {
        "accuracy": accuracy,
        "f1": f1,
        "matthews": OfSums(np.concatenate([right[:, None], said, true], axis=1), _matthews),
        "ece": calibration_error(probability[:, None], (labels == predicted)[:, None]),
        "accuracy_f1": mean_of(accuracy, f1),
    }


def f1_metric(said: Floats, true: Floats, *, only_second: bool = False) -> OfSums:
    """Return the plain mean of every class's F1, or that of class 1 alone.

    Args:
        said: One where the model says a class, else zero: [rows, classes].
        true: One where it is true, in the same shape.
        only_second: Whether only class 1 counts, as in yes and no.
    """
    classes = said.shape[1]
    kept = slice(1, 2) if only_second else slice(None)

    def value_of(sums: Floats) -> Floats:
        hits, either = sums[:, :classes], sums[:, classes:]
        return divide(2 * hits, either)[:, kept].mean(axis=1)

    return OfSums(np.concatenate([said * true, said + true], axis=1), value_of)


def one_hot(ids: NDArray[np.int64], classes: int) -> Floats:
    """Return a one in each row's class and zeros elsewhere: [rows, classes]."""
    return (ids[:, None] == np.arange(classes)).astype(np.float64)


def _matthews(sums: Floats) -> Floats:
    classes = (sums.shape[1] - 1) // 2
    right, said, true = sums[:, 0], sums[:, 1 : 1 + classes], sums[:, 1 + classes :]
    rows = said.sum(axis=1)
    together = right * rows - (said * true).sum(axis=1)
    spread = (rows**2 - (said**2).sum(axis=1)) * (rows**2 - (true**2).sum(axis=1))
    return divide(together, np.sqrt(np.maximum(spread, 0.0)))
