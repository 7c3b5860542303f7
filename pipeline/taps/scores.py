"""Rebuild attention from query and key: log-softmax in float32 over the visible keys.

Costs one seq × seq matrix per head, so only layers that a loss or a check needs are rebuilt.
Queries are independent of each other, so a loss can rebuild a few of them at a time.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Rule = Literal["causal", "full"]

ALL = slice(None)

MapRows = Callable[[slice, slice, Bool[Tensor, "some 1 rows keys"]], Tensor]
"""Function of a slice of examples, a slice of queries, and their visibility mask over the first
keys (they see no later ones); returns that part of a layer's log attention maps,
[some, heads, rows, keys]."""

INVISIBLE = -1e4
"""Log-probability of an invisible key: its exp is exactly 0, and it is in float16's range."""


def visible_keys(
    lengths: Int[Tensor, " batch"], seq: int, rule: Rule, rows: slice = ALL
) -> Bool[Tensor, "batch 1 rows seq"]:
    """Return which keys each query (of `rows`) in a right-padded batch can see.

    A padding query sees no key and no query sees a padding key, so `visible.any(-1)` marks the live
    queries.
    """
    position = torch.arange(seq, device=lengths.device)
    live = position < lengths[:, None]
    visible = live[:, None, rows, None] & live[:, None, None, :]
    if rule == "causal":
        visible = visible & (position[rows, None] >= position)
    return visible


def attention_log_probs(
    query: Float[Tensor, "batch heads rows d_head"],
    key: Float[Tensor, "batch kv_heads keys d_head"],
    scaling: float,
    visible: Bool[Tensor, "batch 1 rows keys"],
) -> Float[Tensor, "batch heads rows keys"]:
    """Return the log of softmax(QKᵀ · scaling) over visible keys, in float32 even under autocast.

    Each key head serves `heads / kv_heads` consecutive query heads. Invisible entries are
    `INVISIBLE` and get no gradient. A query that sees no key is `INVISIBLE` throughout, and gives
    no NaN in either pass.
    """
    batch, heads, rows, _ = query.shape
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    with torch.autocast(query.device.type, enabled=False):
        scores = grouped @ key.float().unsqueeze(2).transpose(-1, -2)
    scores = scores.reshape(batch, heads, rows, key.shape[2]) * scaling
    # Half of the lowest float: subtracting a query's maximum from it must not overflow to -inf.
    lowest = torch.finfo(scores.dtype).min / 2
    log_probs = scores.masked_fill(~visible, lowest).log_softmax(-1)
    return log_probs.masked_fill(~visible, INVISIBLE)


def rows_of_vectors(
    query: Float[Tensor, "batch heads seq d_head"],
    key: Float[Tensor, "batch kv_heads seq d_head"],
    scaling: float,
) -> MapRows:
    """Return a function that rebuilds parts of a layer's log attention maps from query and key."""

    def rows(
        examples: slice, queries: slice, visible: Bool[Tensor, "some 1 rows keys"]
    ) -> Float[Tensor, "some heads rows keys"]:
        first_keys = key[examples, :, : visible.shape[-1]]
        return attention_log_probs(query[examples, :, queries], first_keys, scaling, visible)

    return rows


def first_pairs(lengths: Int[Tensor, " batch"], seq: int, rule: Rule) -> Int[Tensor, "batch seq"]:
    """Return the index of each query's first visible pair, ordered by example, query, then key.

    A query's pairs are contiguous, because it sees the first n keys for some n.
    """
    position = torch.arange(seq, device=lengths.device)
    counts = position + 1 if rule == "causal" else lengths[:, None]
    counts = torch.where(position < lengths[:, None], counts, 0)
    return (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)


def probabilities_to_log(
    maps: Float[Tensor, "batch heads rows keys"],
) -> Float[Tensor, "batch heads rows keys"]:
    """Normalise attention maps to sum to 1 per query and return their log; zero is `INVISIBLE`."""
    sums = maps.sum(-1, keepdim=True)
    log_probs = maps.log() - torch.where(sums > 0, sums, 1.0).log()
    return log_probs.masked_fill(maps <= 0, INVISIBLE)
