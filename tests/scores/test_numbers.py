"""Correlations are scipy's, ties and constants included."""

import logging

import numpy as np
import pytest
from scipy import stats

from pipeline.scores.metric import values
from pipeline.scores.numbers import Numbers
from pipeline.scores.registry import metrics_of


def scores(targets, predicted):
    metrics = metrics_of(Numbers(np.array(targets, float), np.array(predicted, float)))
    return values(metrics, len(targets))


@pytest.mark.parametrize("decimals", [0, 1, 9])
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_correlations_are_scipys(decimals, offset):
    draw = np.random.default_rng(decimals)
    targets = (offset + draw.normal(size=50)).round(decimals)
    predicted = (targets + draw.normal(size=50)).round(decimals)
    found = scores(targets, predicted)
    assert found["pearson"] == pytest.approx(stats.pearsonr(targets, predicted)[0], abs=1e-9)
    assert found["spearman"] == pytest.approx(stats.spearmanr(targets, predicted)[0], abs=1e-12)
    assert found["pearson_spearman"] == pytest.approx(
        (found["pearson"] + found["spearman"]) / 2, abs=1e-12
    )
    assert found["mse"] == pytest.approx(np.mean((targets - predicted) ** 2))


def test_spearman_asks_for_order_alone():
    found = scores([1, 2, 3, 4], [1, 10, 100, 1000])
    assert found["spearman"] == pytest.approx(1)
    assert found["pearson"] < 0.9


def test_a_constant_correlates_with_nothing_and_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        found = scores([1, 2, 3], [0.1, 0.1, 0.1])
    assert (found["pearson"], found["spearman"]) == (0, 0)
    assert "every prediction is 0.1: correlations are 0" in caplog.text


def test_a_resample_of_one_row_has_no_correlation():
    metrics = metrics_of(Numbers(np.array([1.0, 2.0, 4.0]), np.array([2.0, 1.0, 7.0])))
    counts = np.array([[0.0, 0.0, 3.0]])
    assert metrics["pearson"](counts)[0] == 0
    assert metrics["spearman"](counts)[0] == 0
