"""Losses over attention maps, some query rows at a time, so that a layer's maps never exist whole.

Query rows are independent of each other, so any of them can be compared alone, on both sides.
Gradients are found with the values (`ahead`): until the backward pass a layer keeps those of its
query and key and nothing as large as a map.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pipeline.student.losses.ahead import Ahead, at_least_one, gradients_ahead
from pipeline.student.losses.counting import Count
from pipeline.taps.scores import MapRows, Rule, attention_log_probs, visible_keys

CPU_SCORES = 2**20
"""Scores of one chunk, a side: 4 MiB in float32, which stay near the cache."""
DEVICE_SCORES = 2**24
"""The same on a GPU, whose kernels want enough to do for each launch."""


def chunked_map_loss(
    loss: Callable[..., Tensor],
    query: Float[Tensor, "batch heads seq d_head"],
    key: Float[Tensor, "batch kv_heads seq d_head"],
    scaling: float,
    teacher: MapRows,
    live: Bool[Tensor, "batch seq"],
    rule: Rule,
    *,
    count: Count,
    teacher_heads: int = 1,
    scores: int | None = None,
) -> Float[Tensor, ""]:
    """Return a loss of one layer's maps, with a graph to query and key.

    Value and gradients are those of all rows at once, to the rounding of sums; the key's gradient
    is summed in float32.

    Args:
        loss: Takes log-probabilities of both sides, which rows count, which keys these see and the
            count, and returns a sum over rows divided by the count.
        query: The student's.
        key: The student's, of as many heads or fewer.
        scaling: What their products are multiplied by.
        teacher: Gives the same rows of the teacher's maps.
        live: Where tokens are, from the left.
        rule: What a row may see; both sides share it.
        count: Query rows to divide by, over all accumulation steps and ranks; not None, because a
            chunk does not know the others' rows.
        teacher_heads: Heads of the teacher's maps.
        scores: Scores of a chunk; None: as fits the device. One query row is the least.
    """
    batch, heads, seq, _ = query.shape
    if scores is None:
        scores = CPU_SCORES if query.device.type == "cpu" else DEVICE_SCORES
    row_scores = max(heads, teacher_heads) * seq
    lengths, scale = live.sum(-1), at_least_one(count)

    def compute(needs: tuple[bool, ...]) -> Ahead:
        needs_any = any(needs)
        of_query = torch.empty_like(query) if needs_any else None
        of_key = torch.zeros_like(key, dtype=torch.float32) if needs_any else None
        total = torch.zeros((), device=query.device)
        for examples, rows in _chunks(batch, seq, scores // row_scores):
            # No row sees a key after itself.
            keys = slice(rows.stop if rule == "causal" else seq)
            visible = visible_keys(lengths[examples], seq, rule, rows)[..., keys]
            theirs = teacher(examples, rows, visible)
            q = query.detach()[examples, :, rows].float().requires_grad_(needs_any)
            k = key.detach()[examples, :, keys].float().requires_grad_(needs_any)
            with torch.set_grad_enabled(needs_any):
                ours = attention_log_probs(q, k, scaling, visible)
                value = loss(ours, theirs, live[examples, rows], visible, count)
            total += value.detach()
            if of_query is not None and of_key is not None:
                found = torch.autograd.grad(value, (q, k), value.new_ones(()) * scale)
                of_query[examples, :, rows] = found[0]
                of_key[examples, :, keys] += found[1]
        return Ahead(total, (), (of_query, of_key))

    return gradients_ahead(compute, (query, key), scale=scale)[0]


def _chunks(batch: int, seq: int, most_rows: int) -> Iterator[tuple[slice, slice]]:
    """Yield examples and query rows of each chunk: whole examples if a chunk holds one."""
    # As even as can be: a last chunk of two rows would cost as many calls as a whole one.
    parts = -(-seq // max(1, min(seq, most_rows)))
    rows = -(-seq // parts)
    examples = max(1, most_rows // seq) if rows == seq else 1
    for first_example in range(0, batch, examples):
        for first in range(0, seq, rows):
            yield (
                slice(first_example, first_example + examples),
                slice(first, min(seq, first + rows)),
            )
