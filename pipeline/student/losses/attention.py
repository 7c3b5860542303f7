"""Attention losses: divergences of attention maps, row by row, over the keys that a row may see.

A query row counts by itself, so some of a layer's rows may be given at a time. Log-probabilities go
in, so that softmax cannot be applied to probabilities by mistake. Values at invisible keys and in
dead rows are never used, whether -inf, NaN or a large finite negative, neither in the loss nor in
its gradient.
"""

import math
from dataclasses import replace
from typing import NamedTuple

from jaxtyping import Bool, Float

from pipeline.student.losses.counting import Count, sum_over_count
from pipeline.student.losses.lazy_torch import Tensor
from pipeline.student.losses.registry import attention_loss


@attention_loss("kl", equal_heads=True)
def attention_kl(
    student_log_probs: Float[Tensor, "batch heads rows keys"],
    teacher_log_probs: Float[Tensor, "batch heads rows keys"],
    rows: Bool[Tensor, "batch rows"],
    visible: Bool[Tensor, "batch 1 rows keys"],
    count: Count = None,
) -> Float[Tensor, ""]:
    """KL(teacher row ‖ student row), mean over heads, summed over live rows, divided by `count`.

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
    kept = visible & rows[:, None, :, None] & (teacher > -math.inf)
    teacher = teacher.masked_fill(~kept, 0.0)
    student = student_log_probs.float().masked_fill(~kept, 0.0)
    per_row = (teacher.exp() * (teacher - student)).sum(dim=-1).mean(dim=1)
    # Dead rows are 0 already; leaving them out would tell the host how many there are.
    return sum_over_count(per_row.flatten(), rows.sum() if count is None else count)


@attention_loss("head_mean")
def attention_head_mean(
    student_log_probs: Float[Tensor, "batch student_heads rows keys"],
    teacher_log_probs: Float[Tensor, "batch teacher_heads rows keys"],
    rows: Bool[Tensor, "batch rows"],
    visible: Bool[Tensor, "batch 1 rows keys"],
    count: Count = None,
) -> Float[Tensor, ""]:
    """KL(mean teacher row ‖ mean student row), summed over live rows and divided by `count`.

    A baseline for unequal head counts. What single heads do is averaged away; `relations` keep
    more of it.

    Args:
        student_log_probs: Log of the student's attention of one layer; finite at visible keys.
        teacher_log_probs: Log of the aligned teacher layer's attention. Gets no gradient.
        rows: True where a query row counts; False on padding.
        visible: True where a row may see a key; both sides share the rule.
        count: Rows to divide by, over all accumulation steps and ranks. None: the live rows here.

    Returns:
        The loss in nats a row; 0 when the mean maps agree. It equals `attention_kl` for one head on
        each side.
    """
    means = [
        _log_mean_over_heads(log_probs, rows, visible)
        for log_probs in (student_log_probs, teacher_log_probs.detach())
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


attention_relations = replace(
    attention_kl, name="relations", compares="relations", equal_heads=False
)
"""MiniLMv2 (arXiv 2012.15828): `attention_kl` of how tokens relate by query, key and value.

The heads of one kind of vector are concatenated and split anew into as many relation heads on both
sides; softmax(X Xᵀ / √d_r) then compares as attention maps do, though neither the number of heads
nor their width agree. The loss is the mean over relations. The paper's relations see every key;
here a row sees what its attention may see, so that a causal student is not taught the future.
"""


class Vectors(NamedTuple):
    """What maps are made of: softmax(query · keyᵀ · scaling)."""

    query: Float[Tensor, "batch heads seq d_head"]
    key: Float[Tensor, "batch kv_heads seq d_head"]
    scaling: float


def relation_vectors(
    vectors: Float[Tensor, "batch some_heads seq d_head"], relation_heads: int
) -> Vectors:
    """Return vectors split into relation heads of width d_r, as their own query and key.

    Args:
        vectors: Query, key or value of one layer; with grouped queries the latter two have fewer
            heads.
        relation_heads: Heads to split into; divides the total width of all heads.
    """
    joined = vectors.transpose(1, 2).flatten(2)
    split = joined.unflatten(2, (relation_heads, -1)).transpose(1, 2)
    return Vectors(split, split, split.shape[-1] ** -0.5)
