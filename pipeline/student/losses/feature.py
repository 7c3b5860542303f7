"""Feature losses: distances of the student's projected hidden states from the teacher's.

All take states of real tokens only. The teacher's arrive standardised by the store's channel mean
and deviation: raw ones would be dominated by a few outlier channels and by the massive activations
of the first token.
"""

from jaxtyping import Bool, Float

from pipeline.student.losses.counting import Count, sum_over_count
from pipeline.student.losses.lazy_torch import Tensor, torch
from pipeline.student.losses.registry import feature_loss

SHORTEST = 1e-6
"""Vectors shorter than this have no direction: they count as zero and get no gradient from it."""


@feature_loss("mse")
def feature_mse(
    student: Float[Tensor, "tokens d_teacher"],
    teacher: Float[Tensor, "tokens d_teacher"],
    count: Count = None,
) -> Float[Tensor, ""]:
    """Mean squared distance of each token's channels, summed over tokens and divided by `count`.

    Both sides are widened to float32 here: squaring in float16 overflows from a difference of
    256 on.

    Args:
        student: States, already projected to the teacher's width.
        teacher: Standardised features of the same tokens. Gets no gradient.
        count: Tokens to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss in squared deviations of a channel; 0 exactly when the sides agree or no token
        is given.
    """
    squared = (student.float() - teacher.detach().float()).square()
    return sum_over_count(squared.mean(dim=-1), count)


@feature_loss("cosine")
def feature_cosine(
    student: Float[Tensor, "tokens d_teacher"],
    teacher: Float[Tensor, "tokens d_teacher"],
    count: Count = None,
) -> Float[Tensor, ""]:
    """One minus the cosine of each token's states, summed over tokens and divided by `count`.

    Length is left free, which suits a student whose norms grow with depth in another way. The value
    is half the squared distance of the unit vectors, which is exactly 0 for equal ones. A zero
    vector is at 1 from every other and at 0 from another zero.

    Args:
        student: States, already projected to the teacher's width.
        teacher: Standardised features of the same tokens. Gets no gradient.
        count: Tokens to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss, between 0 and 2; 0 exactly when the sides agree or no token is given.
    """
    ours, has_ours = _unit_vectors(student)
    theirs, has_theirs = _unit_vectors(teacher.detach())
    distance = (ours - theirs).square().sum(dim=-1) / 2
    one_is_zero = (has_ours != has_theirs).to(distance.dtype)
    return sum_over_count(torch.where(has_ours & has_theirs, distance, one_is_zero), count)


@feature_loss("pkd")
def feature_pkd(
    student: Float[Tensor, "tokens d_teacher"],
    teacher: Float[Tensor, "tokens d_teacher"],
    count: Count = None,
) -> Float[Tensor, ""]:
    """Squared distance of L2-normalised states, summed over tokens and divided by `count`.

    Patient distillation (PKD-BERT, arXiv 1908.09355, equation 7) does so for the first token of
    each layer; here every live token counts. It is twice `feature_cosine` where both states have a
    direction; a zero vector stays zero.

    Args:
        student: States, already projected to the teacher's width.
        teacher: Standardised features of the same tokens. Gets no gradient.
        count: Tokens to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss, between 0 and 4; 0 exactly when the sides agree or no token is given.
    """
    difference = _unit_vectors(student)[0] - _unit_vectors(teacher.detach())[0]
    return sum_over_count(difference.square().sum(dim=-1), count)


def _unit_vectors(
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
