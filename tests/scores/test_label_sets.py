"""Any number of classes a row: as scikit-learn scores the decisions."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

from pipeline.scores.label_sets import LabelSets
from pipeline.scores.metric import values
from pipeline.scores.registry import metrics_of


def test_by_hand():
    targets = np.array([[1.0, 0.0], [1.0, 1.0]])
    found = values(metrics_of(LabelSets(targets, np.array([[0.9, 0.2], [0.5, 0.1]]))), 2)
    assert found["accuracy"] == 0.5
    assert found["f1"] == pytest.approx(2 * 2 / (2 + 3))
    assert found["f1_macro"] == pytest.approx((1 + 0) / 2)
    # Confidences 0.9, 0.8, 0.5, 0.9; the last is wrong and shares its bin with the first.
    assert found["ece"] == pytest.approx((2 * 0.4 + 0.2 + 0.5) / 4)


@pytest.mark.parametrize("seed", range(4))
def test_scores_are_scikit_learns(seed):
    draw = np.random.default_rng(seed)
    targets = draw.integers(2, size=(30, 4)).astype(float)
    probabilities = draw.random((30, 4))
    said = probabilities >= 0.5
    found = values(metrics_of(LabelSets(targets, probabilities)), 30)
    assert found["accuracy"] == pytest.approx(accuracy_score(targets, said))
    assert found["f1"] == pytest.approx(f1_score(targets, said, average="micro"))
    assert found["f1_macro"] == pytest.approx(f1_score(targets, said, average="macro"))
