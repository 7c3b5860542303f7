"""Losses computed a chunk at a time: logits, attention maps and projected states never exist whole.

A loss that is a sum over rows can be computed a few rows at a time. Under plain autograd what each
chunk made would still wait for the backward pass, or be made a second time there. Here the gradient
of a chunk is computed together with its value, and the backward pass only scales what was kept.
The fused linear losses of Liger Kernel do so too (arXiv 2410.10989).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from pipeline.student.losses.counting import Count
from pipeline.taps.scores import MapRows, Rule, attention_log_probs, visible_keys


class ChunkSizes(NamedTuple):
    """Logits of a chunk, which one product makes, and of a block, which one loss goes over."""

    chunk: int
    block: int


CPU_SIZES = ChunkSizes(chunk=2**24, block=2**20)
"""64 MiB in float32, a side, and 4 MiB: 128 and 8 rows of a vocabulary of 131,072."""
DEVICE_SIZES = ChunkSizes(chunk=2**26, block=2**24)
"""A GPU wants larger ones: more rows for its products, and enough work for each kernel launch."""
CPU_VALUES = 2**20
"""Projected values, or scores, of a chunk, a side: 4 MiB in float32, which stay near the cache."""
DEVICE_VALUES = 2**24
"""The same on a GPU."""


class Ahead(NamedTuple):
    """A loss with the gradients of its inputs.

    Attributes:
        total: The scalar, without a graph.
        terms: Scalars that are reported with it, without a graph.
        gradients: The gradient of `total` times the call's `scale`, for each input; None for an
            input that needs none.
    """

    total: Tensor
    terms: tuple[Tensor, ...]
    gradients: tuple[Tensor | None, ...]


Compute = Callable[[tuple[bool, ...]], Ahead]
"""Takes which inputs need a gradient."""


def gradients_ahead(
    compute: Compute, inputs: Sequence[Tensor | None], *, scale: Count
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the total of `compute`, with a graph to `inputs`, and its terms, with none.

    The graph may be gone through more than once, with any gradient of the total, but not be
    differentiated itself. If no input needs a gradient, or gradients are off, none is computed.

    Args:
        compute: Computes value and gradients; runs at once, under the caller's autocast.
        inputs: All tensors that gradients go to; None for one that does not exist.
        scale: The number, at least 1, that `compute` multiplies gradients by and the backward pass
            divides by. The gradient of one row among many is near the reciprocal of their number,
            which float16 cannot hold before the caller's own scaling reaches it.
    """
    needs = tuple(tensor is not None and tensor.requires_grad for tensor in inputs)
    if not (torch.is_grad_enabled() and any(needs)):
        total, terms, _ = compute((False,) * len(needs))
        return total, terms
    total, *terms = _Ahead.apply(compute, scale, *inputs)
    return total, tuple(terms)


class _Ahead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute, scale: Count, *inputs: Tensor | None) -> Any:
        total, terms, gradients = compute(ctx.needs_input_grad[2:])
        ctx.scale = scale
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in inputs]
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*terms)
        return total, *terms

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - the decorator's doing
        ctx: Any, gradient: Tensor, *_: Any
    ) -> Any:
        factor = gradient / ctx.scale
        # Not in place: the graph may be gone through again. Widened, because a GPU would round the
        # factor to half precision first, and loss scaling may make it larger than float16 holds.
        gradients = [
            None if kept is None else (kept.float() * factor).to(dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, *gradients


def _at_least_one(count: Count) -> int | float | Tensor:
    """Return a count as a scale: 1 if nothing counts. A count on a device stays there."""
    if isinstance(count, Tensor):
        return count.clamp(min=1)
    return max(1, count or 1)


# Logits: the product with the head belongs to the loss. It takes as many products as a plain loss
# does, and nothing is computed twice. There are two sizes, because two things are slow. A product
# reads the head's entire matrix, so a chunk has many rows; a loss goes over its logits some twenty
# times, so it takes a block of a chunk that stays near the cache.

BlockLoss = Callable[[Tensor, slice], tuple[Tensor, ...]]
"""Takes logits of a block of a chunk's rows, and which rows of the chunk they are; returns the
terms, each a sum over rows divided by its own count."""


def chunk_sizes(device: torch.device) -> ChunkSizes:
    """Return the sizes for a device."""
    return CPU_SIZES if device.type == "cpu" else DEVICE_SIZES


def chunked_head_loss(
    begin: Callable[[slice], BlockLoss],
    head_input: Float[Tensor, "rows d"],
    weight: Float[Tensor, "vocab d"],
    bias: Float[Tensor, " vocab"] | None,
    *,
    factors: Sequence[float | Tensor],
    count: Count,
    sizes: ChunkSizes | None = None,
) -> tuple[Float[Tensor, ""], tuple[Float[Tensor, ""], ...]]:
    """Return the weighted sum of losses of a head's logits, with a graph, and each without one.

    Values and gradients are those of all rows at once, to the rounding of sums. The head's gradient
    is summed in float32. Without rows all are zero.

    Args:
        begin: Takes the rows of a chunk and returns the loss of its blocks, so that what belongs to
            the chunk, such as the teacher's logits, is made once.
        head_input: The head's input, one row for each kept position.
        weight: The head's matrix; it gets a gradient if it wants one.
        bias: Its bias, if it has one. The loss applies whatever the head does after it.
        factors: The factor of each term in the sum.
        count: Rows that the terms are divided by, see `gradients_ahead`.
        sizes: None: those of the device.
    """
    chunk, block = sizes or chunk_sizes(head_input.device)
    vocab = len(weight)
    chunk_rows, block_rows = max(1, chunk // vocab), max(1, block // vocab)
    scale = _at_least_one(count)

    def compute(needs: tuple[bool, ...]) -> Ahead:
        device = head_input.device.type
        is_mixed = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if is_mixed else weight.dtype
        # Cast once, not once a chunk.
        matrix, added = weight.detach().to(dtype), None if bias is None else bias.detach().to(dtype)
        of_input = torch.empty_like(head_input) if needs[0] else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if needs[1] else None
        of_bias = torch.zeros(vocab, device=head_input.device) if needs[2] else None
        blocks = _Blocks(factors, scale if any(needs) else None, head_input)
        for first in range(0, max(1, len(head_input)), chunk_rows):
            rows = slice(first, first + chunk_rows)
            inputs = head_input.detach()[rows].to(dtype)
            logits = F.linear(inputs, matrix, added)
            blocks.run(begin(rows), logits, block_rows)
            # From here on `logits` are their gradient.
            with torch.autocast(device, enabled=False):
                if of_input is not None:
                    of_input[rows] = logits @ matrix
                if of_weight is not None and dtype == torch.float32:
                    of_weight.addmm_(logits.T, inputs)
                elif of_weight is not None:
                    of_weight += logits.T @ inputs
                if of_bias is not None:
                    of_bias += logits.sum(0, dtype=torch.float32)
        total, terms = blocks.sums()
        return Ahead(total, terms, (of_input, of_weight, of_bias))

    return gradients_ahead(compute, (head_input, weight, bias), scale=scale)


class _Blocks:
    """Runs a loss over blocks of logits and adds up its terms.

    Args:
        factors: The factor of each term in the sum.
        scale: The factor of all gradients; None if none are wanted.
        like: A tensor on the device.
    """

    def __init__(
        self, factors: Sequence[float | Tensor], scale: int | float | Tensor | None, like: Tensor
    ) -> None:
        # Filled there, not copied there, which would wait for the device.
        self._factors = torch.stack(
            [
                factor.float()
                if isinstance(factor, Tensor)
                else torch.full((), factor, device=like.device)
                for factor in factors
            ]
        )
        self._sums = torch.zeros_like(self._factors)
        self._seeds = None if scale is None else (self._factors * scale).unbind()

    def run(self, loss: BlockLoss, logits: Tensor, block_rows: int) -> None:
        """Add the terms of a chunk; if gradients are wanted, overwrite the logits with theirs."""
        for first in range(0, max(1, len(logits)), block_rows):
            rows = slice(first, first + block_rows)
            block = logits[rows].detach()
            with torch.set_grad_enabled(self._seeds is not None):
                terms = loss(block.requires_grad_(self._seeds is not None), rows)
            self._sums += torch.stack([term.detach().float() for term in terms])
            if self._seeds is not None:
                (gradient,) = torch.autograd.grad(terms, block, self._seeds)
                logits[rows] = gradient

    def sums(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the weighted sum and the terms."""
        return (self._factors * self._sums).sum(), self._sums.unbind()


# Hidden states: the teacher's are several times as wide as the student's, and so is what the
# projector makes of these. Until the backward pass a layer keeps the gradients of its own states
# and of the projector.


def chunked_feature_loss(
    loss: Callable[..., Tensor],
    hidden: Float[Tensor, "tokens d_student"],
    projector: nn.Module,
    teacher: Callable[[slice], Float[Tensor, "rows d_teacher"]],
    *,
    d_teacher: int,
    count: Count,
    values: int | None = None,
) -> Float[Tensor, ""]:
    """Return a loss of one layer's states, with a graph to them and to the projector.

    Value and gradients are those of all tokens at once, to the rounding of sums; the projector's
    gradient is summed in float32.

    Args:
        loss: Takes states of both sides and the count, and returns a sum over tokens divided by
            the count.
        hidden: The student's states of the tokens that count.
        projector: Takes rows of them, in the precision of its weights, to the teacher's width.
        teacher: Returns some rows of the teacher's states of the same tokens.
        d_teacher: Their width.
        count: Tokens to divide by, over all accumulation steps and ranks; not None, because a chunk
            does not know the others' tokens.
        values: Values of a chunk in the teacher's width; None: as fits the device.
    """
    parameters = list(projector.parameters())
    dtype = parameters[0].dtype if parameters else hidden.dtype
    scale = _at_least_one(count)
    if values is None:
        values = CPU_VALUES if hidden.device.type == "cpu" else DEVICE_VALUES
    size = max(1, values // d_teacher)

    def compute(needs: tuple[bool, ...]) -> Ahead:
        of_hidden = torch.empty_like(hidden) if needs[0] else None
        trained = [
            parameter
            for parameter, is_needed in zip(parameters, needs[1:], strict=True)
            if is_needed
        ]
        sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained]
        total = torch.zeros((), device=hidden.device)
        for first in range(0, max(1, len(hidden)), size):
            rows = slice(first, first + size)
            states = hidden.detach()[rows].requires_grad_(needs[0])
            with torch.set_grad_enabled(any(needs)):
                value = loss(projector(states.to(dtype)), teacher(rows), count)
            total += value.detach()
            if any(needs):
                inputs = [*([states] if needs[0] else []), *trained]
                gradients = list(torch.autograd.grad(value, inputs, value.new_ones(()) * scale))
                if of_hidden is not None:
                    of_hidden[rows] = gradients.pop(0)
                for summed, gradient in zip(sums, gradients, strict=True):
                    summed += gradient
        of_trained = iter(sums)
        of_parameters = (next(of_trained) if is_needed else None for is_needed in needs[1:])
        return Ahead(total, (), (of_hidden, *of_parameters))

    return gradients_ahead(compute, (hidden, *parameters), scale=scale)[0]


# Attention maps: query rows are independent of each other, so any of them can be compared alone, on
# both sides. Until the backward pass a layer keeps the gradients of its query and key and nothing
# as large as a map.


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
        key: The student's, with as many heads or fewer.
        scaling: The factor of their products.
        teacher: Returns the same rows of the teacher's maps.
        live: Where tokens are, from the left.
        rule: Which keys a row may see; both sides share it.
        count: Query rows to divide by, over all accumulation steps and ranks; not None, because a
            chunk does not know the others' rows.
        teacher_heads: Heads of the teacher's maps.
        scores: Scores of a chunk; None: as fits the device. A chunk has at least one query row.
    """
    batch, heads, seq, _ = query.shape
    if scores is None:
        scores = CPU_VALUES if query.device.type == "cpu" else DEVICE_VALUES
    row_scores = max(heads, teacher_heads) * seq
    lengths, scale = live.sum(-1), _at_least_one(count)

    def compute(needs: tuple[bool, ...]) -> Ahead:
        needs_any = any(needs)
        of_query = torch.empty_like(query) if needs_any else None
        of_key = torch.zeros_like(key, dtype=torch.float32) if needs_any else None
        total = torch.zeros((), device=query.device)
        for examples, rows in _map_chunks(batch, seq, scores // row_scores):
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
                of_q, of_k = torch.autograd.grad(value, (q, k), value.new_ones(()) * scale)
                of_query[examples, :, rows] = of_q
                of_key[examples, :, keys] += of_k
        return Ahead(total, (), (of_query, of_key))

    return gradients_ahead(compute, (query, key), scale=scale)[0]


def _map_chunks(batch: int, seq: int, most_rows: int) -> Iterator[tuple[slice, slice]]:
    """Yield examples and query rows of each chunk: complete examples if a chunk holds one."""
    # As even as can be: a last chunk of two rows would cost as many calls as a full one.
    parts = -(-seq // max(1, min(seq, most_rows)))
    rows = -(-seq // parts)
    examples = max(1, most_rows // seq) if rows == seq else 1
    for first_example in range(0, batch, examples):
        for first in range(0, seq, rows):
            yield (
                slice(first_example, first_example + examples),
                slice(first, min(seq, first + rows)),
            )
