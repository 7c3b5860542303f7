"""Measures of any number of classes a row: each class is decided by itself, at one half."""

import numpy as np

from pipeline.evaluate.scores.calibration import calibration_error
from pipeline.evaluate.scores.classification import f1_metric
from pipeline.evaluate.scores.measure import Floats, Metric, quotient

THRESHOLD = 0.5


def multi_label_metrics(targets: Floats, probabilities: Floats) -> dict[str, Metric]:
    """Return `accuracy`, `f1`, `f1_macro` and `ece`.

    Accuracy is the share of rows with exactly the right set; F1 is over all decisions (micro), its
    macro form the plain mean of every class's; calibration is that of every decision.

    Args:
        targets: One where a class is true, else zero: [rows, classes].
        probabilities: What the model gives each class, in the same shape.
    """
    said = (probabilities >= THRESHOLD).astype(np.float64)
    right = said == targets
    exact = right.all(axis=1).astype(np.float64)
    return {
        "accuracy": quotient(exact, np.ones_like(exact)),
        "f1": quotient(2 * (said * targets).sum(axis=1), (said + targets).sum(axis=1)),
        "f1_macro": f1_metric(said, targets),
        "ece": calibration_error(np.maximum(probabilities, 1 - probabilities), right),
    }
