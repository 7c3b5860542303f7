"""Directions of states: cosine and PKD, by plain torch and at zero vectors."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from pipeline.student.losses.feature import feature_cosine, feature_pkd

BOTH = pytest.mark.parametrize("loss", [feature_cosine, feature_pkd])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_cosine_is_one_minus_the_cosine_averaged_over_tokens():
    student, teacher = normal(6, 5), normal(6, 5, seed=1)
    wanted = 1 - cosine_similarity(student, teacher)
    torch.testing.assert_close(feature_cosine(student, teacher), wanted.mean())
    torch.testing.assert_close(feature_cosine(student, teacher, 12), wanted.sum() / 12)


def test_pkd_is_the_squared_distance_of_unit_vectors():
    student, teacher = normal(6, 5), normal(6, 5, seed=1)
    wanted = (normalize(student) - normalize(teacher)).square().sum(-1)
    torch.testing.assert_close(feature_pkd(student, teacher), wanted.mean())


@BOTH
def test_length_does_not_matter_and_equal_sides_are_at_zero(loss):
    student, teacher = normal(6, 5), normal(6, 5, seed=1)
    torch.testing.assert_close(loss(3 * student, 0.1 * teacher), loss(student, teacher))
    assert loss(student, student).item() == 0.0


@BOTH
def test_zero_vectors_give_finite_values_and_gradients(loss):
    student = torch.stack([torch.zeros(5), torch.zeros(5), normal(5), torch.full((5,), 1e-30)])
    teacher = torch.stack([torch.zeros(5), normal(5), torch.zeros(5), normal(5)])
    student.requires_grad_()
    per_token = [loss(student[i : i + 1], teacher[i : i + 1]) for i in range(4)]
    torch.stack(per_token).sum().backward()
    assert [round(value.item(), 5) for value in per_token] == [0.0, 1.0, 1.0, 1.0]
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() <= 1.0


@BOTH
def test_half_precision_does_not_overflow(loss):
    student = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert loss(student, torch.ones(1, 4)).item() == pytest.approx(0.0, abs=1e-6)


@BOTH
def test_no_tokens_are_zero(loss):
    student = normal(3, 4).requires_grad_()
    value = loss(student[:0], normal(0, 4), torch.tensor(0))
    value.backward()
    assert value.item() == 0.0
    assert student.grad is not None
    assert not student.grad.any()
