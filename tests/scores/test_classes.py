"""One class a row is scored as written-out confusion matrices and scikit-learn say."""

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

from pipeline.scores.classes import BINS, Classes, calibration_error
from pipeline.scores.metric import values
from pipeline.scores.registry import metrics_of


def scores(labels, predicted, classes):
    labels, predicted = np.array(labels), np.array(predicted)
    sure = np.ones(len(labels))
    return values(metrics_of(Classes(labels, predicted, sure, classes)), len(labels))


def test_binary_scores_from_a_written_out_table():
    # true positives 2, false positives 1, false negatives 1, true negatives 4
    found = scores([1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 1, 0, 0, 0, 0], 2)
    assert found["accuracy"] == 6 / 8
    assert found["f1"] == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert found["matthews"] == pytest.approx((2 * 4 - 1 * 1) / (3 * 3 * 5 * 5) ** 0.5)
    assert found["accuracy_f1"] == pytest.approx((6 / 8 + 4 / 6) / 2)
    assert found["ece"] == pytest.approx(2 / 8)


def test_with_three_classes_f1_is_the_plain_mean_and_an_absent_class_counts_zero():
    found = scores([0, 0, 1, 1], [0, 0, 1, 0], 3)
    assert found["f1"] == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)


def test_one_class_only_scores_zero_without_a_warning():
    found = scores([0, 1], [0, 0], 2)
    assert (found["accuracy"], found["f1"], found["matthews"]) == (0.5, 0.0, 0.0)


@pytest.mark.parametrize("classes", [2, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_scores_are_scikit_learns(classes, seed):
    draw = np.random.default_rng([classes, seed])
    labels = draw.integers(classes, size=40)
    predicted = np.where(draw.random(40) < 0.6, labels, draw.integers(classes, size=40))
    found = scores(labels, predicted, classes)
    average = "binary" if classes == 2 else "macro"
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predicted))
    assert found["f1"] == pytest.approx(
        f1_score(
            labels,
            predicted,
            labels=None if classes == 2 else list(range(classes)),
            average=average,
            zero_division=0,
        )
    )
    assert found["matthews"] == pytest.approx(matthews_corrcoef(labels, predicted))


def ece(confidence, correct):
    metric = calibration_error(np.array(confidence, float), np.array(correct, bool))
    return values({"ece": metric}, len(confidence))["ece"]


def test_a_model_that_is_right_as_often_as_it_is_sure_is_calibrated():
    confidence = [[0.75]] * 4 + [[0.5]] * 4
    assert ece(confidence, [[1], [1], [1], [0], [1], [0], [1], [0]]) == pytest.approx(0)


def test_calibration_by_hand():
    # 0.88 and 0.92 share a bin: right half the time, on average 0.9 sure; 0.55 is alone.
    assert ece([[0.88], [0.92], [0.55]], [[1], [0], [1]]) == pytest.approx(
        2 / 3 * (0.9 - 0.5) + 1 / 3 * (1 - 0.55)
    )


def test_bins_are_closed_above_and_hold_both_ends():
    edge = 3 / BINS
    assert ece([[edge], [edge - 1e-6]], [[0], [1]]) == pytest.approx(0.5 - edge, abs=1e-5)
    assert ece([[edge], [edge + 1e-6]], [[0], [1]]) == pytest.approx(0.5, abs=1e-5)
    assert ece([[0.0], [1.0]], [[0], [1]]) == 0
