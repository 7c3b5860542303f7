"""Chance is what the best constant answer scores, whatever a model said."""

import math

import numpy as np
import pytest

from pipeline.evaluate.chance import score_at_chance


def chance(rows, task, score, classes=None):
    return score_at_chance(rows, task, score, classes=classes, vocab=16)


def labelled(*labels):
    return [{"label": label, "predicted": 0, "probability": 0.5} for label in labels]


@pytest.mark.parametrize(
    ("score", "want"),
    [("accuracy", 0.75), ("f1", 2 / 5), ("matthews", 0), ("ece", None), ("accuracy_f1", 0.375)],
)
def test_one_class_to_everything(score, want):
    found = chance(labelled(0, 0, 0, 1), "classification", score, 2)
    assert found == (want if want is None else pytest.approx(want))


def test_f1_of_three_classes_is_the_mean_with_two_of_them_never_said():
    rows = labelled(2, 2, 1, 0)
    assert chance(rows, "classification", "f1", 3) == pytest.approx((2 / 3) / 3)


def test_one_set_to_everything():
    targets = [[1, 0, 0], [1, 1, 0], [1, 1, 0], [0, 0, 0]]
    rows = [{"targets": row, "probabilities": [0.1, 0.1, 0.1]} for row in targets]
    # {first} hits 3 of 4 said and 5 true, {first, second} 5 of 8 and 5.
    assert chance(rows, "multi-label", "f1") == pytest.approx(2 * 5 / (8 + 5))
    assert chance(rows, "multi-label", "accuracy") == 0.5


def test_the_mean_to_everything():
    rows = [{"target": value, "predicted": 9.0} for value in (1.0, 2.0, 6.0)]
    assert chance(rows, "regression", "mse") == pytest.approx(np.var([1, 2, 6]))
    assert chance(rows, "regression", "pearson_spearman") == 0


@pytest.mark.parametrize(
    ("score", "want"),
    [
        ("perplexity", 16),
        ("nats_per_token", math.log(16)),
        ("bits_per_byte", 4 * 5 / 10),
        ("cer", 1),
        ("exact_match", 0),
        ("chrf", 0),
    ],
)
def test_every_id_as_likely_and_no_text(score, want):
    rows = [
        {"nats": 1.0, "targets": n, "bytes": 5, "words": 1, "text": "it", "references": ["it is"]}
        for n in (2, 3)
    ]
    assert chance(rows, "prompt-target", score) == pytest.approx(want)
