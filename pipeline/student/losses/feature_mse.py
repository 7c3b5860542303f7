"""Feature alignment: the squared distance of projected student states to the teacher's.

The teacher's features arrive standardised by the store's channel mean and deviation. Raw ones
would be owned by a few outlier channels and by the first token's massive activations.
"""

from jaxtyping import Float
from torch import Tensor

from pipeline.student.losses.counting import Count, sum_over_count


def feature_mse(
    student: Float[Tensor, "tokens d_teacher"],
    teacher: Float[Tensor, "tokens d_teacher"],
    count: Count = None,
) -> Float[Tensor, ""]:
    """Mean squared distance of each token's channels, summed over tokens and divided by `count`.

    Both sides are widened to float32 here: squaring in float16 overflows from a difference of
    256 on.

    Args:
        student: States of real tokens only, already projected to the teacher's width.
        teacher: Standardised features of the same tokens. Gets no gradient.
        count: Tokens to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss in squared deviations of a channel; 0 exactly when the sides agree or no token
        is given.
    """
    squared = (student.float() - teacher.detach().float()).square()
    return sum_over_count(squared.mean(dim=-1), count)
