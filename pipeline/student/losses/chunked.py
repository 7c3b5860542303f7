"""Losses over a large vocabulary, a few rows at a time, so that the logits never exist as a whole.

The product with the head belongs to it. It takes as many products as a plain loss does: gradients
are found with the values (`ahead`), and nothing is computed twice.

Two sizes, because two things are slow. A product reads the head's whole matrix, so a chunk has many
rows; a loss goes over its logits some twenty times, so it takes a block of a chunk that stays near
the cache. The block's gradient then takes the place of its logits.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from pipeline.student.losses.ahead import Ahead, at_least_one, gradients_ahead
from pipeline.student.losses.counting import Count

BlockLoss = Callable[[Tensor, slice], tuple[Tensor, ...]]
"""Takes logits of a block of a chunk's rows, and which rows of the chunk they are; returns the
terms, each a sum over rows divided by its own count."""


class ChunkSizes(NamedTuple):
    """Logits of a chunk, which one product makes, and of a block, which one loss goes over."""

    chunk: int
    block: int


CPU_SIZES = ChunkSizes(chunk=2**24, block=2**20)
"""64 MiB in float32, a side, and 4 MiB: 128 and 8 rows of a vocabulary of 131,072."""
DEVICE_SIZES = ChunkSizes(chunk=2**26, block=2**24)
"""A GPU wants larger ones: its products more rows, its kernels enough to do for each launch."""


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
        head_input: What the head multiplies, one row for each kept position.
        weight: The head's matrix; it gets a gradient if it wants one.
        bias: Its bias, if it has one. Whatever the head does after it is the loss's part.
        factors: What each term is multiplied by in the sum.
        count: Rows that the terms are divided by, see `gradients_ahead`.
        sizes: None: those of the device.
    """
    chunk, block = sizes or chunk_sizes(head_input.device)
    vocab = len(weight)
    chunk_rows, block_rows = max(1, chunk // vocab), max(1, block // vocab)
    scale = at_least_one(count)

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
        factors: What each term is multiplied by.
        scale: What gradients are multiplied by; None if there shall be none.
        like: A tensor on the device.
    """

    def __init__(
        self, factors: Sequence[float | Tensor], scale: int | float | Tensor | None, like: Tensor
    ) -> None:
        # Filled there, not copied there, which would wait for the device.
        self._factors = torch.stack(
            [
                one.float() if isinstance(one, Tensor) else torch.full((), one, device=like.device)
                for one in factors
            ]
        )
        self._sums = torch.zeros_like(self._factors)
        self._seeds = None if scale is None else (self._factors * scale).unbind()

    def run(self, loss: BlockLoss, logits: Tensor, block_rows: int) -> None:
        """Add the terms of a chunk; where gradients are wanted, put them in the logits' place."""
        for first in range(0, max(1, len(logits)), block_rows):
            rows = slice(first, first + block_rows)
            block = logits[rows].detach()
            with torch.set_grad_enabled(self._seeds is not None):
                terms = loss(block.requires_grad_(self._seeds is not None), rows)
            self._sums += torch.stack([one.detach().float() for one in terms])
            if self._seeds is not None:
                (found,) = torch.autograd.grad(terms, block, self._seeds)
                logits[rows] = found

    def sums(self) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the weighted sum and the terms."""
        return (self._factors * self._sums).sum(), self._sums.unbind()
