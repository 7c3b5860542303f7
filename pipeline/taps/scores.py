"""Attention rebuilt from query and key: log-softmax in float32 over the keys a row may see.

Costs one seq × seq matrix a head, so it runs for the layers a loss or a check asks for and no
others.
"""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Rule = Literal["causal", "full"]

INVISIBLE = -1e4
"""Log-probability of a key a row may not see: exp of it is exactly 0, and it fits half."""


def visible_keys(
    lengths: Int[Tensor, " batch"], seq: int, rule: Rule
) -> Bool[Tensor, "batch 1 seq seq"]:
    """Say which keys each query row of a right-padded batch may see.

    A padding row sees nothing and nothing sees a padding key, so `visible.any(-1)` marks the live
    rows.
    """
    position = torch.arange(seq, device=lengths.device)
    live = position < lengths[:, None]
    visible = live[:, None, :, None] & live[:, None, None, :]
    if rule == "causal":
        visible = visible & (position[:, None] >= position)
    return visible


def attention_log_probs(
    query: Float[Tensor, "batch heads seq d_head"],
    key: Float[Tensor, "batch kv_heads seq d_head"],
    scaling: float,
    visible: Bool[Tensor, "batch 1 seq seq"],
) -> Float[Tensor, "batch heads seq seq"]:
    """Log of softmax(QKᵀ · scaling) over visible keys, in float32 also under autocast.

    Each key head serves `heads / kv_heads` consecutive query heads. Invisible entries are
    `INVISIBLE` and get no gradient; a row that sees nothing is `INVISIBLE` throughout, and neither
    pass makes a NaN of it.
    """
    batch, heads, seq, _ = query.shape
    grouped = query.float().unflatten(1, (key.shape[1], -1))
    with torch.autocast(query.device.type, enabled=False):
        scores = grouped @ key.float().unsqueeze(2).transpose(-1, -2)
    scores = scores.reshape(batch, heads, seq, seq) * scaling
    # Half of the smallest float: subtracting a row's maximum from it must not overflow to -inf.
    lowest = torch.finfo(scores.dtype).min / 2
    log_probs = scores.masked_fill(~visible, lowest).log_softmax(-1)
    return log_probs.masked_fill(~visible, INVISIBLE)


def spread_pairs(
    pairs: Float[Tensor, "pairs heads"], visible: Bool[Tensor, "batch 1 seq seq"]
) -> Float[Tensor, "batch heads seq seq"]:
    """Put values of visible pairs, by example, then query, then key, into maps; zero elsewhere."""
    full = pairs.new_zeros((*visible[:, 0].shape, pairs.shape[1]))
    full[visible[:, 0]] = pairs
    return full.permute(0, 3, 1, 2)


def probabilities_to_log(
    maps: Float[Tensor, "batch heads seq seq"],
) -> Float[Tensor, "batch heads seq seq"]:
    """Log of maps whose rows are made to sum to 1; a key of no probability is `INVISIBLE`."""
    sums = maps.sum(-1, keepdim=True)
    log_probs = maps.log() - torch.where(sums > 0, sums, 1.0).log()
    return log_probs.masked_fill(maps <= 0, INVISIBLE)
