"""Bootstrap intervals: the same each run, as wide as theory says, whatever is held at once."""

import time

import numpy as np
import pytest

from pipeline.evaluate import significance
from pipeline.evaluate.options import IntervalOptions
from pipeline.evaluate.significance import bootstrap_intervals, resampled_counts
from pipeline.scores.metric import quotient
from pipeline.scores.numbers import Numbers
from pipeline.scores.registry import metrics_of


def mean(values):
    return quotient(np.asarray(values, float), np.ones(len(values)))


def test_every_resample_has_as_many_rows_as_there_are():
    (counts,) = resampled_counts(7, 50, np.random.default_rng(0))
    assert counts.shape == (50, 7)
    assert (counts.sum(axis=1) == 7).all()
    assert counts.mean() == pytest.approx(1)


def test_the_same_seed_gives_the_same_interval_however_much_is_held_at_once(monkeypatch):
    metrics = {"mean": mean(np.random.default_rng(1).normal(size=40))}
    whole = bootstrap_intervals(metrics, 40, IntervalOptions(resamples=100))
    monkeypatch.setattr(significance, "CHUNK_CELLS", 40 * 7)
    assert bootstrap_intervals(metrics, 40, IntervalOptions(resamples=100)) == whole
    assert bootstrap_intervals(metrics, 40, IntervalOptions(resamples=100, seed=1)) != whole


def test_the_interval_of_a_mean_is_the_normal_one():
    values = np.random.default_rng(2).normal(size=400)
    low, high = bootstrap_intervals({"m": mean(values)}, 400, IntervalOptions())["m"]
    half = 1.96 * values.std() / 20
    assert low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert high == pytest.approx(values.mean() + half, abs=0.15 * half)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    covered = 0
    for seed in range(200):
        values = np.random.default_rng(seed).random(60) < 0.7
        options = IntervalOptions(resamples=200, confidence=0.9, seed=seed)
        low, high = bootstrap_intervals({"m": mean(values)}, 60, options)["m"]
        covered += low <= 0.7 <= high
    assert 165 <= covered <= 195


def test_rows_that_all_agree_leave_nothing_open():
    assert bootstrap_intervals({"m": mean(np.ones(5))}, 5, IntervalOptions())["m"] == (1, 1)


def test_ranks_of_two_thousand_rows_are_resampled_in_seconds():
    draw = np.random.default_rng(0)
    metrics = metrics_of(Numbers(*draw.normal(size=(2, 2000))))
    started = time.process_time()
    bootstrap_intervals({"s": metrics["spearman"]}, 2000, IntervalOptions())
    assert time.process_time() - started < 2
