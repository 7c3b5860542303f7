"""Terms made equally strong: each is scaled by what its gradient in the student is found to be.

Gradient norms of terms differ by orders of magnitude between tasks and over a run, so a weight says
little by itself; with this one it is a share of the reference term's gradient. The idea is that of
GradNorm (arXiv 1711.02257), without its learned weights: the factor is the quotient of norms.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

MEMORY = 0.9
"""Share of the old norm in a new one: a single batch's gradient is noisy."""
BOUNDS = (1e-3, 1e3)
REFERENCES = ("output", "labels", "feature", "attention")
"""Whose gradient the others are scaled to: the first of these that is on."""


class Balance(nn.Module):
    """Smoothed gradient norms and the factors that follow from them, kept in checkpoints.

    Args:
        terms: The terms that are on at some time.
    """

    norms: Tensor
    factors: Tensor

    def __init__(self, terms: Sequence[str]) -> None:
        super().__init__()
        self._place = {term: place for place, term in enumerate(terms)}
        self.register_buffer("norms", torch.full((len(terms),), torch.nan))
        self.register_buffer("factors", torch.ones(len(terms)))

    def factor(self, term: str) -> Tensor:
        """Return what a term's weight is multiplied by; 1 until the term is measured."""
        return self.factors[self._place[term]]

    def lacks(self, terms: Sequence[str]) -> bool:
        """Tell whether one of these terms has never been measured."""
        return bool(self.norms[[self._place[term] for term in terms]].isnan().any())

    def update(self, measured: Mapping[str, float]) -> None:
        """Take in the norms of the unweighted gradients of the terms that are on.

        A norm that is not finite is passed over. A term whose norm is 0 keeps its factor.
        """
        for term, norm in measured.items():
            place = self._place[term]
            old, new = self.norms[place], torch.as_tensor(norm).to(self.norms)
            if not new.isfinite():
                continue
            self.norms[place] = new if old.isnan() else MEMORY * old + (1 - MEMORY) * new
        on = [term for term in REFERENCES if term in measured and self._norm(term) > 0]
        for term in on:
            quotient = self._norm(on[0]) / self._norm(term)
            self.factors[self._place[term]] = quotient.clamp(*BOUNDS)

    def _norm(self, term: str) -> Tensor:
        return self.norms[self._place[term]]
