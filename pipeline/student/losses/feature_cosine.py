"""Feature alignment by direction alone: one minus the cosine of each token's two states.

Length is left free, which suits a student whose norms grow with depth in another way.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.student.losses.counting import Count, sum_over_count

SHORTEST = 1e-6
"""Vectors shorter than this have no direction: they count as zero and get no gradient from it."""


def feature_cosine(
    student: Float[Tensor, "tokens d_teacher"],
    teacher: Float[Tensor, "tokens d_teacher"],
    count: Count = None,
) -> Float[Tensor, ""]:
    """One minus the cosine of each token's states, summed over tokens and divided by `count`.

    Computed as half the squared distance of the unit vectors, which is exactly 0 for equal ones. A
    zero vector is at 1 from every other and at 0 from another zero.

    Args:
        student: States of real tokens only, already projected to the teacher's width.
        teacher: Standardised features of the same tokens. Gets no gradient.
        count: Tokens to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss, between 0 and 2; 0 exactly when the sides agree or no token is given.
    """
    ours, has_ours = unit_vectors(student)
    theirs, has_theirs = unit_vectors(teacher.detach())
    distance = (ours - theirs).square().sum(dim=-1) / 2
    one_is_zero = (has_ours != has_theirs).to(distance.dtype)
    return sum_over_count(torch.where(has_ours & has_theirs, distance, one_is_zero), count)


def unit_vectors(
    states: Float[Tensor, "tokens d"],
) -> tuple[Float[Tensor, "tokens d"], Bool[Tensor, " tokens"]]:
    """Return the states at length 1 in float32, and which have a direction; the others are 0.

    The gradient is finite everywhere, at zero vectors too.
    """
    states = states.float()
    squared = states.square().sum(dim=-1)
    has_direction = squared > SHORTEST**2
    # Inside the root, not outside: the gradient of a root at 0 is infinite even when masked.
    scale = torch.where(has_direction, squared, 1.0).rsqrt()
    scale = scale.masked_fill(~has_direction, 0.0)
    return states * scale[:, None], has_direction
