"""Factors from gradient norms: quotients, smoothed, bounded, and safe where a norm says nothing."""

import math

import pytest
import torch

from pipeline.student.align.balance import Balance


def factors(balance: Balance, *terms: str) -> list[float]:
    return [round(float(balance.factor(term)), 5) for term in terms]


def test_terms_are_scaled_to_the_output_terms_norm():
    balance = Balance(("feature", "attention", "output"))
    assert factors(balance, "feature", "output") == [1.0, 1.0]
    balance.update({"feature": 8.0, "attention": 0.5, "output": 2.0})
    assert factors(balance, "feature", "attention", "output") == [0.25, 4.0, 1.0]


def test_the_reference_is_the_first_that_is_on():
    balance = Balance(("feature", "attention", "labels"))
    balance.update({"feature": 8.0, "attention": 2.0})
    assert factors(balance, "feature", "attention", "labels") == [1.0, 4.0, 1.0]
    assert not balance.lacks(["feature"])
    assert balance.lacks(["feature", "labels"])
    balance.update({"labels": 4.0})
    assert factors(balance, "labels") == [1.0]


def test_norms_are_smoothed():
    balance = Balance(("output", "labels"))
    balance.update({"output": 1.0, "labels": 1.0})
    balance.update({"output": 1.0, "labels": 11.0})
    assert factors(balance, "labels") == [0.5]  # 0.9 · 1 + 0.1 · 11 = 2


def test_factors_are_bounded():
    balance = Balance(("feature", "attention", "output"))
    balance.update({"feature": 1e-9, "attention": 1e9, "output": 1.0})
    assert factors(balance, "feature", "attention") == [1e3, 1e-3]


@pytest.mark.parametrize("norm", [0.0, math.nan, math.inf])
def test_a_norm_that_says_nothing_changes_nothing(norm):
    balance = Balance(("feature", "output"))
    balance.update({"feature": norm, "output": 1.0})
    assert factors(balance, "feature", "output") == [1.0, 1.0]
    other = Balance(("feature", "output"))
    other.update({"feature": 4.0, "output": norm})
    assert factors(other, "feature") == [1.0]


def test_it_survives_a_checkpoint():
    balance, other = Balance(("feature", "output")), Balance(("feature", "output"))
    balance.update({"feature": 3.0, "output": 1.0})
    other.load_state_dict(balance.state_dict())
    for one in (balance, other):
        one.update({"feature": 5.0, "output": 2.0})
    assert torch.equal(balance.factors, other.factors)
