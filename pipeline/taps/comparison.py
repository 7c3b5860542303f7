"""Compare tapped tensors with the model's own within a tolerance, and word the refusal."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError

FLOAT32_BOUND = 1e-4
BOUNDS = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest allowed difference by dtype: absolute for values up to 1, relative above."""
PACKED_BOUNDS = {"is_loaded_in_8bit": 0.1, "is_loaded_in_4bit": 5e-2}
"""Minimum tolerance for quantised weights, by the model's attribute. With 8-bit weights the input
activations are quantised too, where a difference in the last bit can move a full quantisation step;
with 4-bit weights a CPU may multiply in bfloat16."""

PIECE_VALUES = 2**22
"""Values of each side that are compared at a time: 16 MiB in float32."""

Pieces = Callable[[int, slice], Tensor]
"""Computes values of some positions of one example, [rows, ...]."""


def bound_of(model: PreTrainedModel) -> float:
    """Return the largest allowed difference between two computations of one value in a model."""
    packed = [bound for name, bound in PACKED_BOUNDS.items() if getattr(model, name, False)]
    return max([BOUNDS.get(model.dtype, FLOAT32_BOUND), *packed])


@dataclass(frozen=True, eq=False)
class Comparison:
    """Compares tensors of a right-padded batch at its live positions, within a bound."""

    model_class: str
    live: Bool[Tensor, "batch seq"]
    bound: float

    def difference(
        self,
        ours: Pieces | Shaped[Tensor, "batch ..."],
        theirs: Shaped[Tensor, "batch ..."],
        live: Bool[Tensor, "batch seq"] | None = None,
    ) -> float:
        """Return the largest difference over live positions, divided by max(1, max |theirs|).

        Tensors with two dimensions are per example and compared completely. Only `PIECE_VALUES` of
        each side are widened at a time.

        Args:
            ours: The values, or a function that computes a piece of them.
            theirs: The model's.
            live: Positions to compare; None for all that are no padding.
        """
        live = self.live if live is None else live
        compute = (lambda example, rows: ours[example, rows]) if isinstance(ours, Tensor) else ours
        difference = largest = torch.zeros((), device=theirs.device)
        step = max(1, PIECE_VALUES // max(1, math.prod(theirs.shape[2:])))
        for example in range(len(theirs)):
            for first in range(0, theirs.shape[1], step):
                rows = slice(first, first + step)
                piece = compute(example, rows).float()
                # Blocks of a large model may be on different devices.
                expected = theirs[example, rows].to(piece.device).float()
                apart, size = (piece - expected).abs(), expected.abs()
                if theirs.ndim > 2:
                    dead = ~live[example, rows].to(piece.device)
                    dead = dead.view(-1, *[1] * (theirs.ndim - 2))
                    apart, size = apart.masked_fill(dead, 0), size.masked_fill(dead, 0)
                # Unlike Python's max, these keep NaN.
                difference = torch.maximum(difference, apart.amax().to(difference))
                largest = torch.maximum(largest, size.amax().to(largest))
        return float(difference / largest.clamp(min=1.0))

    def require_equal(self, what: str, ours: Pieces | Tensor, theirs: Tensor, remedy: str) -> None:
        """Refuse `what` if it differs by more than the bound; NaN differs from everything.

        Raises:
            IncompatibleError: With the difference, the bound, and `remedy`.
        """
        if isinstance(ours, Tensor) and ours.shape != theirs.shape:
            problem = f"has shape {list(ours.shape)}, expected {list(theirs.shape)}"
        elif not (difference := self.difference(ours, theirs)) <= self.bound:
            problem = f"differs by {difference:.2g} from the model, expected at most {self.bound:g}"
        else:
            return
        raise IncompatibleError(f"{self.model_class}: {what} {problem}; {remedy}")
