"""What counts as equal when a tap is held against the model, and the words of a refusal."""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from pipeline.errors import IncompatibleError

FLOAT32_BOUND = 1e-4
BOUNDS = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest allowed difference by dtype: absolute for values up to 1, else relative."""


@dataclass(frozen=True, eq=False)
class Comparison:
    """Compares tensors of one right-padded batch at its live positions, within a bound."""

    model_class: str
    live: Bool[Tensor, "batch seq"]
    bound: float

    def difference(
        self,
        ours: Shaped[Tensor, "batch ..."],
        theirs: Shaped[Tensor, "batch ..."],
        live: Bool[Tensor, "batch seq"] | None = None,
    ) -> float:
        """Return the largest difference over live positions in units of the largest value, or of 1.

        Tensors of two dimensions belong to examples, and all of them counts.
        """
        ours, theirs = ours.float(), theirs.float()
        if ours.ndim > 2:
            live = self.live if live is None else live
            ours, theirs = ours[live], theirs[live]
        return float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=1.0))

    def require_equal(self, what: str, ours: Tensor, theirs: Tensor, remedy: str) -> None:
        """Refuse `what` where it differs; NaN differs from everything.

        Raises:
            IncompatibleError: With the difference, the bound, and `remedy`.
        """
        if ours.shape != theirs.shape:
            found = f"has shape {list(ours.shape)}, expected {list(theirs.shape)}"
        elif not (difference := self.difference(ours, theirs)) <= self.bound:
            found = f"differs by {difference:.2g} from the model, expected at most {self.bound:g}"
        else:
            return
        raise IncompatibleError(f"{self.model_class}: {what} {found}; {remedy}")
