"""Hard labels that are numbers: the squared distance."""

from jaxtyping import Float
from torch import Tensor

from pipeline.student.losses.counting import Count, sum_over_count


def label_mse(
    outputs: Float[Tensor, "rows outputs"],
    targets: Float[Tensor, "rows outputs"],
    count: Count = None,
) -> Float[Tensor, ""]:
    """Squared distance to the targets, mean over outputs, summed over rows / `count`.

    Args:
        outputs: What the student says.
        targets: What is true, in the same unit.
        count: Rows to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss in squared units of the target; exactly 0 when no row is given.
    """
    squared = (outputs.float() - targets.float()).square()
    return sum_over_count(squared.mean(dim=-1), count)
