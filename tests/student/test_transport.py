"""Plans of optimal transport, beside a linear program, and the mean over student layers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from pipeline.student.align.transport import mapped_loss, transport_plan


def least_cost(cost: Tensor) -> float:
    """The optimum of the transport problem as a linear program."""
    m, n = cost.shape
    rows = np.kron(np.eye(m), np.ones(n))
    columns = np.kron(np.ones(m), np.eye(n))
    found = linprog(
        cost.double().numpy().ravel(),
        A_eq=np.vstack([rows, columns]),
        b_eq=np.concatenate([np.full(m, 1 / m), np.full(n, 1 / n)]),
        method="highs",
    )
    return float(found.fun)


@settings(deadline=None, max_examples=25)
@given(students=st.integers(1, 5), teachers=st.integers(1, 6), seed=st.integers(0, 1000))
def test_a_plan_is_a_cheapest_one_between_uniform_masses(students, teachers, seed):
    cost = torch.rand(students, teachers, generator=torch.Generator().manual_seed(seed))
    plan = transport_plan(cost)
    assert (plan >= 0).all()
    torch.testing.assert_close(plan.sum(1), torch.full((students,), 1 / students))
    torch.testing.assert_close(plan.sum(0), torch.full((teachers,), 1 / teachers))
    assert float((plan * cost).sum()) == pytest.approx(least_cost(cost), rel=1e-5)
    assert int((plan > 0).sum()) <= students * teachers


def test_a_cost_that_is_not_finite_gives_the_even_plan():
    plan = transport_plan(torch.tensor([[1.0, torch.nan], [0.0, 1.0]]))
    assert plan.tolist() == [[0.25, 0.25], [0.25, 0.25]]


COST = torch.tensor([[9.0, 1.0, 5.0], [2.0, 9.0, 4.0], [9.0, 9.0, 3.0]])


def table(cost: Tensor, seen: list | None = None):
    def against(teacher: int):
        def compare(student: int) -> Tensor:
            if seen is not None and torch.is_grad_enabled():
                seen.append((student, teacher))
            return cost[student - 1, teacher - 1]

        return compare

    return against


def test_a_plan_that_pairs_one_to_one_says_what_the_pairs_say():
    graphs: list = []
    many = {student: [1, 2, 3] for student in (1, 2, 3)}
    found = mapped_loss(many, table(COST, graphs))
    assert found.item() == mapped_loss({1: 2, 2: 1, 3: 3}, table(COST)).item() == 2.0
    assert sorted(graphs) == [(1, 2), (2, 1), (3, 3)]  # the others are never part of a graph


def test_a_pair_beside_a_plan_has_a_layers_part_in_the_mean():
    found = mapped_loss({1: 3, 2: [1, 2], 3: [1, 2]}, table(COST))
    assert found.item() == pytest.approx((5.0 + 2 * (2.0 + 9.0) / 2) / 3)


def test_gradients_go_through_what_is_carried_alone():
    cost = COST.clone().requires_grad_()
    mapped_loss({1: [1, 2], 2: [1, 2]}, table(cost)).backward()
    assert cost.grad is not None
    assert cost.grad.tolist() == [[0.0, 0.5, 0.0], [0.5, 0.0, 0.0], [0.0, 0.0, 0.0]]
