"""Attention rebuilt from query and key: log-softmax in float32 over the keys a row may see.

Costs one seq × seq matrix a head, so it runs for the layers a loss or a check asks for and no
others; query rows are independent of each other, so a loss may ask for a few of them at a time.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Rule = Literal["causal", "full"]

ALL = slice(None)

MapRows = Callable[[slice, slice, Bool[Tensor, "some 1 rows keys"]], Tensor]
"""Takes examples, query rows and what these see of the first keys, beyond which they see none;
returns the log of that part of a layer's maps, [some, heads, rows, keys]."""

INVISIBLE = -1e4
"""Log-probability of a key a row may not see: exp of it is exactly 0, and it fits half."""


def visible_keys(
    lengths: Int[Tensor, " batch"], seq: int, rule: Rule, rows: slice = ALL
) -> Bool[Tensor, "batch 1 rows seq"]:
    """Say which keys each query row, or each of some, of a right-padded batch may see.

    A padding row sees nothing and nothing sees a padding key, so `visible.any(-1)` marks the live
    rows.
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
    """Log of softmax(QKᵀ · scaling) over visible keys, in float32 also under autocast.

    Each key head serves `heads / kv_heads` consecutive query heads. Invisible entries are
    `INVISIBLE` and get no gradient; a row that sees nothing is `INVISIBLE` throughout, and neither
    pass makes a NaN of it.
    """
    batch, heads, rows, _ = query.shape
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    with torch.autocast(query.device.type, enabled=False):
        scores = grouped @ key.float().unsqueeze(2).transpose(-1, -2)
    scores = scores.reshape(batch, heads, rows, key.shape[2]) * scaling
    # Half of the smallest float: subtracting a row's maximum from it must not overflow to -inf.
    lowest = torch.finfo(scores.dtype).min / 2
    log_probs = scores.masked_fill(~visible, lowest).log_softmax(-1)
    return log_probs.masked_fill(~visible, INVISIBLE)


def rows_of_vectors(
    query: Float[Tensor, "batch heads seq d_head"],
    key: Float[Tensor, "batch kv_heads seq d_head"],
    scaling: float,
) -> MapRows:
    """Return what gives rows of the maps of query and key."""

    def rows(
        examples: slice, queries: slice, visible: Bool[Tensor, "some 1 rows keys"]
    ) -> Float[Tensor, "some heads rows keys"]:
        seen = key[examples, :, : visible.shape[-1]]
        return attention_log_probs(query[examples, :, queries], seen, scaling, visible)

    return rows


def first_pairs(lengths: Int[Tensor, " batch"], seq: int, rule: Rule) -> Int[Tensor, "batch seq"]:
    """Return where each query row begins among visible pairs by example, then query, then key.

    Its pairs stand together, for a row sees the first keys, however many.
    """
    position = torch.arange(seq, device=lengths.device)
    counts = position + 1 if rule == "causal" else lengths[:, None]
    counts = torch.where(position < lengths[:, None], counts, 0)
    return (counts.flatten().cumsum(0) - counts.flatten()).view_as(counts)


def probabilities_to_log(
    maps: Float[Tensor, "batch heads rows keys"],
) -> Float[Tensor, "batch heads rows keys"]:
    """Log of maps whose rows are made to sum to 1; a key of no probability is `INVISIBLE`."""
    sums = maps.sum(-1, keepdim=True)
    log_probs = maps.log() - torch.where(sums > 0, sums, 1.0).log()
    return log_probs.masked_fill(maps <= 0, INVISIBLE)
