"""Gradient norms of the terms, and factors that make the terms equally strong.

Gradient norms of terms differ by orders of magnitude between tasks and over a run, so a weight says
little by itself. With a balance, a weight is a share of the reference term's gradient: each term is
scaled by the quotient of the two norms. The idea is that of GradNorm (arXiv 1711.02257), without
its learned weights.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

MEMORY = 0.9
"""Share of the old norm in a new one: the gradient of a single batch is noisy."""
BOUNDS = (1e-3, 1e3)
REFERENCES = ("output", "labels", "feature", "attention")
"""The reference is the first of these terms that is on."""


class TermGradients:
    """The gradient of each term in the student, summed over micro-batches and ranks.

    Args:
        student: The student; its trained weights count.
    """

    def __init__(self, student: nn.Module) -> None:
        self._student = student
        self._flat: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor], scale: float = 1.0) -> None:
        """Add the gradients of a micro-batch; costs a backward pass a term.

        Args:
            terms: Each term with a graph of its own.
            scale: Their factor in the backward pass, so that half precision holds the gradients.
        """
        parameters = [p for p in self._student.parameters() if p.requires_grad]
        for term, value in terms.items():
            gradients = torch.autograd.grad(
                value * scale, parameters, retain_graph=True, materialize_grads=True
            )
            flat = torch.cat([gradient.detach().flatten() for gradient in gradients]) / scale
            self._flat[term] = self._flat[term] + flat if term in self._flat else flat

    def norms(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the norms of a step's gradients and forget these.

        Args:
            over_ranks: Sums a tensor over all ranks.
        """
        norms = {term: float(over_ranks(flat).norm()) for term, flat in self._flat.items()}
        self._flat = {}
        return norms


class Balance(nn.Module):
    """Smoothed gradient norms and the factors that follow from them; both are in checkpoints.

    Args:
        terms: The terms that are on at some step.
    """

    norms: Tensor
    factors: Tensor

    def __init__(self, terms: Sequence[str]) -> None:
        super().__init__()
        self._index = {term: index for index, term in enumerate(terms)}
        self.register_buffer("norms", torch.full((len(terms),), torch.nan))
        self.register_buffer("factors", torch.ones(len(terms)))

    def factor(self, term: str) -> Tensor:
        """Return the factor of a term's weight; 1 until the term is measured."""
        return self.factors[self._index[term]]

    def lacks(self, terms: Sequence[str]) -> bool:
        """Tell whether one of these terms has never been measured."""
        return bool(self.norms[[self._index[term] for term in terms]].isnan().any())

    def update(self, measured: Mapping[str, float]) -> None:
        """Update the factors by the norms of the unweighted gradients of the terms that are on.

        A norm that is not finite is ignored. A term whose norm is 0 keeps its factor.
        """
        for term, norm in measured.items():
            index = self._index[term]
            old, new = self.norms[index], torch.as_tensor(norm).to(self.norms)
            if not new.isfinite():
                continue
            self.norms[index] = new if old.isnan() else MEMORY * old + (1 - MEMORY) * new
        on = [term for term in REFERENCES if term in measured and self._norm(term) > 0]
        for term in on:
            quotient = self._norm(on[0]) / self._norm(term)
            self.factors[self._index[term]] = quotient.clamp(*BOUNDS)

    def _norm(self, term: str) -> Tensor:
        return self.norms[self._index[term]]
