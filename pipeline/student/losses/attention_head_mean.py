"""Attention alignment for unequal head counts, as a baseline: the maps' mean over heads.

What single heads do is averaged away; relations keep more of it.
"""

import math

from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.student.losses.attention_kl import attention_kl
from pipeline.student.losses.counting import Count


def attention_head_mean(
    student_log_probs: Float[Tensor, "batch student_heads rows keys"],
    teacher_log_probs: Float[Tensor, "batch teacher_heads rows keys"],
    rows: Bool[Tensor, "batch rows"],
    visible: Bool[Tensor, "batch 1 rows keys"],
    count: Count = None,
) -> Float[Tensor, ""]:
    """KL(mean teacher row ‖ mean student row), summed over live rows and divided by `count`.

    Args:
        student_log_probs: Log of the student's attention of one layer; finite at visible keys.
        teacher_log_probs: Log of the aligned teacher layer's attention. Gets no gradient.
        rows: True where a query row counts; False on padding.
        visible: True where a row may see a key; both sides share the rule.
        count: Rows to divide by, over all accumulation steps and ranks. None: the live rows here.

    Returns:
        The loss in nats a row; 0 when the mean maps agree. `attention_kl` for a head each.
    """
    means = [
        _log_mean_over_heads(side, rows, visible)
        for side in (student_log_probs, teacher_log_probs.detach())
    ]
    return attention_kl(means[0], means[1], rows, visible, count)


def _log_mean_over_heads(
    log_probs: Float[Tensor, "batch heads rows keys"],
    rows: Bool[Tensor, "batch rows"],
    visible: Bool[Tensor, "batch 1 rows keys"],
) -> Float[Tensor, "batch 1 rows keys"]:
    """Average probabilities; what does not count is made finite first, for the gradient's sake."""
    kept = visible & rows[:, None, :, None]
    summed = log_probs.float().masked_fill(~kept, 0.0).logsumexp(dim=1, keepdim=True)
    return summed - math.log(log_probs.shape[1])
