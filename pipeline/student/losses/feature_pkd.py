"""Patient distillation: the squared distance of states that are first brought to length 1.

PKD-BERT (arXiv 1908.09355, equation 7) does so for the first token of each layer; here every live
token counts.
"""

from jaxtyping import Float
from torch import Tensor

from pipeline.student.losses.counting import Count, sum_over_count
from pipeline.student.losses.feature_cosine import unit_vectors


def feature_pkd(
    student: Float[Tensor, "tokens d_teacher"],
    teacher: Float[Tensor, "tokens d_teacher"],
    count: Count = None,
) -> Float[Tensor, ""]:
    """Squared distance of L2-normalised states, summed over tokens and divided by `count`.

    Twice `feature_cosine` where both states have a direction; a zero vector stays zero.

    Args:
        student: States of real tokens only, already projected to the teacher's width.
        teacher: Standardised features of the same tokens. Gets no gradient.
        count: Tokens to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss, between 0 and 4; 0 exactly when the sides agree or no token is given.
    """
    difference = unit_vectors(student)[0] - unit_vectors(teacher.detach())[0]
    return sum_over_count(difference.square().sum(dim=-1), count)
