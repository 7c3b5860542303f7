"""How strong each term pulls: the norm of its gradient in the student, over a whole step."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


class TermGradients:
    """The gradient of each term, added up over micro-batches and ranks.

    Args:
        student: Whose weights, as far as they are trained.
    """

    def __init__(self, student: nn.Module) -> None:
        self._student = student
        self._flat: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Add the gradients of a micro-batch; costs a backward pass a term.

        Args:
            terms: Each term with a graph of its own.
            scale: What they are multiplied by on the way back, so that half precision holds it.
        """
        parameters = [p for p in self._student.parameters() if p.requires_grad]
        for term, value in terms.items():
            found = torch.autograd.grad(
                value * scale, parameters, retain_graph=True, materialize_grads=True
            )
            flat = torch.cat([gradient.detach().flatten() for gradient in found]) / scale
            self._flat[term] = self._flat[term] + flat if term in self._flat else flat

    def norms(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the norms of a step's gradients and forget them.

        Args:
            over_ranks: Sums a tensor over all ranks.
        """
        found = {term: float(over_ranks(flat).norm()) for term, flat in self._flat.items()}
        self._flat = {}
        return found
