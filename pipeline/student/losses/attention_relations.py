"""Attention alignment whatever the head counts: how tokens relate by query, key and value.

MiniLMv2 (arXiv 2012.15828): the heads of one kind of vector are concatenated and split anew into
as many relation heads on both sides; softmax(X Xᵀ / √d_r) then compares, though neither the number
of heads nor their width agree.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.student.losses.attention_kl import attention_kl
from pipeline.student.losses.counting import Count
from pipeline.taps.scores import attention_log_probs


def attention_relations(
    student: Mapping[str, Tensor],
    teacher: Mapping[str, Tensor],
    rows: Bool[Tensor, "batch seq"],
    visible: Bool[Tensor, "batch 1 seq seq"],
    relation_heads: int,
    count: Count = None,
) -> Float[Tensor, ""]:
    """KL(teacher relation ‖ student relation), mean over relations and relation heads.

    Summed over live rows and divided by `count`. The paper's relations see every key; here a row
    sees what its attention may see, so that a causal student is not taught the future.

    Args:
        student: By relation (`qq`, `kk`, `vv`), the vectors it is made of, [batch, heads, seq,
            d_head]; with grouped queries `kk` and `vv` have the key heads' width.
        teacher: The same of the aligned teacher layer. Gets no gradient.
        rows: True where a query row counts; False on padding.
        visible: True where a row may see a key.
        relation_heads: Heads to split into; divides every width.
        count: Rows to divide by, over all accumulation steps and ranks. None: the live rows here.

    Returns:
        The loss in nats a row; 0 when all relations agree.
    """
    found = [
        attention_kl(
            relation_log_probs(student[name], relation_heads, visible),
            relation_log_probs(teacher[name].detach(), relation_heads, visible),
            rows,
            visible,
            count,
        )
        for name in teacher
    ]
    return torch.stack(found).mean()


def relation_log_probs(
    vectors: Float[Tensor, "batch some_heads seq d_head"],
    relation_heads: int,
    visible: Bool[Tensor, "batch 1 seq seq"],
) -> Float[Tensor, "batch relation_heads seq seq"]:
    """Log of softmax(X Xᵀ / √d_r) of vectors split into relation heads of width d_r."""
    joined = vectors.transpose(1, 2).flatten(2)
    split = joined.unflatten(2, (relation_heads, -1)).transpose(1, 2)
    return attention_log_probs(split, split, split.shape[-1] ** -0.5, visible)
