"""Attention alignment: KL of the student's attention rows from the teacher's, over visible keys.

Each query row counts by itself, so some of a layer's rows may be given at a time.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.student.losses.counting import Count, sum_over_count


def attention_kl(
    student_log_probs: Float[Tensor, "batch heads rows keys"],
    teacher_log_probs: Float[Tensor, "batch heads rows keys"],
    rows: Bool[Tensor, "batch rows"],
    visible: Bool[Tensor, "batch 1 rows keys"],
    count: Count = None,
) -> Float[Tensor, ""]:
    """KL(teacher row ‖ student row), mean over heads, summed over live rows, divided by `count`.

    Log-probabilities go in, so that softmax cannot be applied to probabilities by mistake. What
    stands at invisible keys and in dead rows is never used, whether -inf, NaN or a large finite
    negative, neither in the value nor in the gradient.

    Args:
        student_log_probs: Log of the student's attention of one layer.
        teacher_log_probs: Log of the aligned teacher layer's attention. Gets no gradient.
        rows: True where a query row counts; False on padding.
        visible: True where a row may see a key; both sides share the rule.
        count: Rows to divide by, over all accumulation steps and ranks. None: the live rows here.

    Returns:
        The loss in nats a row; 0 exactly when the sides agree or no row is live.
    """
    teacher = teacher_log_probs.detach().float()
    # 0 * log 0 = 0: a key that the teacher gives no mass at all is no part of the sum.
    kept = visible & rows[:, None, :, None] & (teacher > -torch.inf)
    teacher = teacher.masked_fill(~kept, 0.0)
    student = student_log_probs.float().masked_fill(~kept, 0.0)
    per_row = (teacher.exp() * (teacher - student)).sum(dim=-1).mean(dim=1)
    # Dead rows are 0 already; leaving them out would tell the host how many there are.
    return sum_over_count(per_row.flatten(), rows.sum() if count is None else count)
