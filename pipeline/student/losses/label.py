"""Losses of the true labels, one for each kind of task."""

from collections.abc import Callable

from jaxtyping import Float, Int

from pipeline.student.losses.counting import Count, sum_over_count
from pipeline.student.losses.lazy_torch import Tensor, torch


def label_loss(task: str) -> Callable[..., Tensor]:
    """Return the loss of true labels that a task's labels have."""
    if task == "multi-label":
        return label_bce
    return label_mse if task == "regression" else label_cross_entropy


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


def label_bce(
    logits: Float[Tensor, "rows classes"],
    targets: Float[Tensor, "rows classes"],
    count: Count = None,
) -> Float[Tensor, ""]:
    """Binary cross-entropy, mean over classes, summed over rows and divided by `count`.

    Args:
        logits: Raw logits, one a class; the classes do not exclude each other.
        targets: 1 where a row has the class, else 0.
        count: Rows to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss in nats a class; exactly 0 when no row is given.
    """
    per_class = torch.nn.functional.binary_cross_entropy_with_logits(
        logits.float(), targets.float(), reduction="none"
    )
    return sum_over_count(per_class.mean(dim=-1), count)


def label_mse(
    outputs: Float[Tensor, "rows outputs"],
    targets: Float[Tensor, "rows outputs"],
    count: Count = None,
) -> Float[Tensor, ""]:
    """Squared distance to the targets, mean over outputs, summed over rows / `count`.

    Args:
        outputs: The student's outputs.
        targets: The true numbers, in the same unit.
        count: Rows to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss in squared units of the target; exactly 0 when no row is given.
    """
    squared = (outputs.float() - targets.float()).square()
    return sum_over_count(squared.mean(dim=-1), count)
