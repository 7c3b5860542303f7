"""Hard labels: cross-entropy with the corpus's own targets."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from pipeline.student.losses.counting import Count, sum_over_count


def label_cross_entropy(
    logits: Float[Tensor, "rows vocab"],
    targets: Int[Tensor, " rows"],
    count: Count = None,
) -> Float[Tensor, ""]:
    """Negative log-probability of the targets, summed over rows and divided by `count`.

    Rows without a target are left out by the caller. There is no ignored index: a -100 that slips
    through fails here instead of being counted in the divisor only.

    Args:
        logits: Raw logits of the rows that have a target.
        targets: Class or token id of each row.
        count: Rows to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss in nats a row; exactly 0 when no row is given.
    """
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    return sum_over_count(-log_probs.gather(1, targets.long()[:, None])[:, 0], count)
