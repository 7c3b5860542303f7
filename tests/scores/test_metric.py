"""Metrics as functions of counts: a row that counts twice is a row that stands there twice."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.scores.classes import Classes
from pipeline.scores.label_sets import LabelSets
from pipeline.scores.likelihood import Likelihood
from pipeline.scores.metric import divide, quotient, values
from pipeline.scores.numbers import Numbers
from pipeline.scores.registry import metrics_of
from pipeline.scores.text import GeneratedText

ROWS = 12
DRAW = np.random.default_rng(3)
LABELS = DRAW.integers(3, size=ROWS)
PREDICTED = DRAW.integers(3, size=ROWS)
NUMBERS = DRAW.normal(size=(2, ROWS)).round(1)
SHARES = DRAW.uniform(size=(ROWS, 3))
TRUE = DRAW.integers(2, size=(ROWS, 3)).astype(float)
COUNTS = DRAW.integers(1, 40, size=(3, ROWS)).astype(float)
WORDS = np.array(["a", "bb", "the", "cat", "sat", "on", "mats", "of", "old", "house", "."])
TEXTS = [" ".join(DRAW.choice(WORDS, size=5)) for _ in range(ROWS)]
REFERENCES = [
    [" ".join(DRAW.choice(WORDS, size=6)) for _ in range(1 + row % 3)] for row in range(ROWS)
]

MAKERS = {
    "classification": lambda rows: Classes(
        LABELS[rows], PREDICTED[rows], SHARES[rows].max(axis=1), 3
    ),
    "multi-label": lambda rows: LabelSets(TRUE[rows], SHARES[rows]),
    "regression": lambda rows: Numbers(NUMBERS[0][rows], NUMBERS[1][rows]),
    "language": lambda rows: Likelihood(*COUNTS[:, rows], COUNTS[2][rows] * 5),
    "text": lambda rows: GeneratedText(
        [TEXTS[row] for row in rows], [REFERENCES[row] for row in rows]
    ),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_resample_by_counts_is_the_metric_of_the_resampled_rows(kind):
    everything = metrics_of(MAKERS[kind](np.arange(ROWS)))
    for seed in range(3):
        drawn = np.random.default_rng(seed).integers(ROWS, size=ROWS)
        counts = np.bincount(drawn, minlength=ROWS)[None].astype(float)
        again = values(metrics_of(MAKERS[kind](drawn)), ROWS)
        for name, metric in everything.items():
            assert metric(counts)[0] == pytest.approx(again[name], abs=1e-12), name


@pytest.mark.parametrize("kind", MAKERS)
def test_draws_do_not_mix(kind):
    counts = np.random.default_rng(0).integers(1, 3, size=(4, ROWS)).astype(float)
    for name, metric in metrics_of(MAKERS[kind](np.arange(ROWS))).items():
        together = metric(counts)
        assert together.shape == (4,)
        assert [metric(one[None])[0] for one in counts] == pytest.approx(together), name


@given(st.lists(st.tuples(st.floats(0, 9), st.integers(1, 9)), min_size=1, max_size=9))
def test_a_quotient_divides_sums(pairs):
    above, below = np.array(pairs, dtype=float).T
    found = values({"q": quotient(above, below)}, len(pairs))["q"]
    assert found == pytest.approx(above.sum() / below.sum())


def test_nothing_divided_by_nothing_is_zero():
    assert divide(np.array([1.0, 0.0, 6.0]), np.array([0.0, 0.0, 3.0])).tolist() == [0, 0, 2]


def test_a_tokenizer_decides_perplexity_a_token_and_not_a_word_or_byte():
    nats = np.array([6.0, 3.0])
    words, size = np.array([2.0, 1.0]), np.array([9.0, 4.0])
    coarse = values(metrics_of(Likelihood(nats, np.array([3.0, 1.0]), words, size)), 2)
    fine = values(metrics_of(Likelihood(nats, np.array([9.0, 4.0]), words, size)), 2)
    assert coarse["perplexity"] == pytest.approx(np.exp(9 / 4))
    assert coarse["perplexity"] > fine["perplexity"]
    assert coarse["perplexity_per_word"] == fine["perplexity_per_word"] == pytest.approx(np.exp(3))
    assert coarse["perplexity_per_byte"] == fine["perplexity_per_byte"]
    assert coarse["bits_per_byte"] == pytest.approx(9 / 13 / np.log(2))


def test_words_that_nobody_counted_have_no_perplexity():
    one = np.ones(2)
    assert set(metrics_of(Likelihood(one, one))) == {"nats_per_token", "perplexity"}
