"""Attention alignment whatever the head counts: how tokens relate by query, key and value.

MiniLMv2 (arXiv 2012.15828): the heads of one kind of vector are concatenated and split anew into
as many relation heads on both sides; softmax(X Xᵀ / √d_r) then compares as maps do, by
`attention_kl`, though neither the number of heads nor their width agree. The loss is the mean over
relations. The paper's relations see every key; here a row sees what its attention may see, so that
a causal student is not taught the future.
"""

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


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
        relation_heads: Heads to split into; divides the vectors' whole width.
    """
    joined = vectors.transpose(1, 2).flatten(2)
    split = joined.unflatten(2, (relation_heads, -1)).transpose(1, 2)
    return Vectors(split, split, split.shape[-1] ** -0.5)
