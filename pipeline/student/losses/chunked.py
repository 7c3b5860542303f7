"""Losses over a large vocabulary, a few rows at a time, so that the logits never exist as a whole.

It costs a second matrix product with the head in the backward pass.
"""

from collections.abc import Callable
from functools import reduce
from typing import TypeVar

from jaxtyping import Float, Shaped
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Scalars = TypeVar("Scalars", Tensor, tuple[Tensor, ...])


def chunked_rows(
    fn: Callable[..., Scalars],
    head_input: Float[Tensor, "rows d"],
    *row_tensors: Shaped[Tensor, "rows ..."],
    chunk_rows: int,
) -> Scalars:
    """Sum `fn` over chunks of rows, each recomputed in the backward pass.

    At most one chunk of what `fn` makes, such as [rows, vocab] logits, is alive at a time, forward
    and backward. Values and gradients, those of parameters that `fn` uses included, are those of
    one call with all rows, to the rounding of sums.

    Args:
        fn: Takes a chunk of `head_input` and of each of `row_tensors`; returns a scalar or a tuple
            of scalars that are sums over rows. A loss in it therefore needs an explicit `count`.
            It must not draw random numbers: it runs twice.
        head_input: What the head multiplies, one row for each kept position.
        row_tensors: Whatever else `fn` needs of the same rows.
        chunk_rows: Rows in a chunk, at least 1.

    Returns:
        What `fn` returns, summed over chunks. Without rows, what it returns for none.

    Raises:
        ValueError: If `chunk_rows` is below 1.
    """
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows is {chunk_rows}; a chunk needs at least 1 row")
    rows = head_input.shape[0]
    if rows <= chunk_rows:
        # One chunk alone is the bound already; recomputing it would buy nothing.
        return fn(head_input, *row_tensors)
    parts: list[Scalars] = []
    for start in range(0, rows, chunk_rows):
        chunk = [tensor[start : start + chunk_rows] for tensor in (head_input, *row_tensors)]
        parts.append(checkpoint(fn, *chunk, use_reentrant=False, preserve_rng_state=False))
    return reduce(_add, parts)


def _add(left: Scalars, right: Scalars) -> Scalars:
    """Add two results of `fn`, whichever of its two shapes it chose."""
    if isinstance(left, tuple):
        return tuple(one + other for one, other in zip(left, right, strict=True))
    return left + right
