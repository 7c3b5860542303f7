"""Gradients found in the forward pass, so that nothing else of a loss lives until the backward one.

A loss that is a sum over rows can be computed a few rows at a time. Under plain autograd what each
part made would still wait for the backward pass, or be made a second time there. Here each part's
gradient is found as soon as its value is, and the backward pass only scales what was kept. The
fused linear losses of Liger Kernel do so too (arXiv 2410.10989).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pipeline.student.losses.counting import Count


class Ahead(NamedTuple):
    """A loss with the gradients of its inputs.

    Attributes:
        total: The scalar, without a graph.
        terms: Scalars to be shown beside it, without a graph.
        gradients: Of `total` times the call's `scale`, for each input; None for one without need.
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
    differentiated itself. Where no input needs a gradient, or gradients are off, none is computed.

    Args:
        compute: Finds value and gradients; runs at once, under the caller's autocast.
        inputs: All that gradients go to; None for what is not there.
        scale: What `compute` multiplies gradients by and the backward pass divides by, at least 1.
            That of one row among many is near its count's reciprocal, which float16 cannot hold
            before the caller's own scaling reaches it.
    """
    needs = tuple(one is not None and one.requires_grad for one in inputs)
    if not (torch.is_grad_enabled() and any(needs)):
        total, terms, _ = compute((False,) * len(needs))
        return total, terms
    total, *terms = _Ahead.apply(compute, scale, *inputs)
    return total, tuple(terms)


def at_least_one(count: Count) -> int | float | Tensor:
    """Return a count as a scale: where nothing counts, 1. A count on a device stays there."""
    if isinstance(count, Tensor):
        return count.clamp(min=1)
    return max(1, count or 1)


class _Ahead(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, compute: Compute, scale: Count, *inputs: Tensor | None) -> Any:
        total, terms, gradients = compute(ctx.needs_input_grad[2:])
        ctx.scale, ctx.dtypes = scale, [None if one is None else one.dtype for one in inputs]
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
        found = [
            None if kept is None else (kept.float() * factor).to(dtype)
            for kept, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return None, None, *found
