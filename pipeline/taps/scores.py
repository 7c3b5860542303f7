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
