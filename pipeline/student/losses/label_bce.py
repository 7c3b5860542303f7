"""Hard labels of classes that do not exclude each other: binary cross-entropy, class by class."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from pipeline.student.losses.counting import Count, sum_over_count


def label_bce(
    logits: Float[Tensor, "rows classes"],
    targets: Float[Tensor, "rows classes"],
    count: Count = None,
) -> Float[Tensor, ""]:
    """Binary cross-entropy, mean over classes, summed over rows and divided by `count`.

    Args:
        logits: Raw logits, one a class.
        targets: 1 where a row has the class, else 0.
        count: Rows to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss in nats a class; exactly 0 when no row is given.
    """
    found = binary_cross_entropy_with_logits(logits.float(), targets.float(), reduction="none")
    return sum_over_count(found.mean(dim=-1), count)
