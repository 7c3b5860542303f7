"""Optimal transport between student and teacher layers, computed anew for each batch.

BERT-EMD (arXiv 2010.06133) with uniform masses, and without that paper's cost attention, which
would learn the masses. The transport plan is a constant; gradients go through the costs it picks.
"""

from collections.abc import Callable, Mapping, Sequence
from math import lcm

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

Compare = Callable[[int], Tensor]


def transport_plan(
    cost: Float[Tensor, "students teachers"],
) -> Float[Tensor, "students teachers"]:
    """Return the transport plan of least cost between uniform masses; its entries sum to 1.

    With integer masses some optimal plan is integer. So each layer is split into equal copies, the
    same number on both sides, and an exact assignment of copies is an optimal plan.

    Args:
        cost: Cost of carrying all of one student layer to one teacher layer. If one is not finite,
            the plan is even, so that the loss shows it.
    """
    students, teachers = cost.shape
    copies = lcm(students, teachers)
    if not bool(cost.isfinite().all()):
        return torch.full_like(cost, 1 / (students * teachers))
    own, other = copies // students, copies // teachers
    split = cost.detach().double().cpu().repeat_interleave(own, 0).repeat_interleave(other, 1)
    rows, columns = linear_sum_assignment(split.numpy())
    plan = torch.zeros(students, teachers, dtype=torch.float64)
    pairs = (torch.from_numpy(rows // own), torch.from_numpy(columns // other))
    plan.index_put_(pairs, torch.full((copies,), 1 / copies, dtype=plan.dtype), accumulate=True)
    return plan.to(cost)


def mapped_loss(
    pairs: Mapping[int, int | Sequence[int]], against: Callable[[int], Compare]
) -> Float[Tensor, ""]:
    """Return the mean over student layers of their loss against their teacher layers.

    Student layers with a list of teachers share one transport plan. Each weighs as much in the mean
    as a layer with one teacher, so a plan that pairs one to one has the loss of the same pairs.

    Args:
        pairs: The layer map; all lists in it are the same.
        against: Takes a teacher layer and returns the loss by student layer.
    """
    losses = [
        against(teacher)(student) for student, teacher in pairs.items() if isinstance(teacher, int)
    ]
    many = {s: list(t) for s, t in pairs.items() if not isinstance(t, int)}
    if many:
        losses += _transported(list(many), next(iter(many.values())), against)
    return torch.stack(losses).sum() / len(pairs)


def _transported(
    students: list[int], teachers: list[int], against: Callable[[int], Compare]
) -> list[Tensor]:
    """Return the terms of the plan's cost, times the number of student layers.

    Costs are computed without a graph first: at most students + teachers - 1 of them are in the
    plan, and a graph of all costs would keep every pair's maps.
    """
    columns = []
    with torch.no_grad():
        for teacher in teachers:
            compare = against(teacher)
            columns.append(torch.stack([compare(student) for student in students]))
    plan = transport_plan(torch.stack(columns, dim=1)) * len(students)
    terms = []
    for column, teacher in enumerate(teachers):
        picked = [row for row in range(len(students)) if plan[row, column] > 0]
        compare = against(teacher) if picked else None
        for row in picked:
            assert compare is not None
            terms.append(plan[row, column] * compare(students[row]))
    return terms
