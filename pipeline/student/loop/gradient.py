"""The gradient of one optimiser step, over its batches, their micro-batches and all ranks."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import TrainerState

from pipeline.student.align.balance import TermGradients
from pipeline.student.align.distiller import Distiller
from pipeline.student.data.feed import Batch, Fed
from pipeline.student.losses.counting import Count
from pipeline.training.values import GRADIENT, LOSS, StepValues


class StepGradient:
    """Computes and clips gradients, and keeps the value of each term by step.

    Each term is divided by its own count over all accumulation steps and ranks.

    Args:
        distiller: Student and projectors.
        model: The same as `accelerate` has prepared it.
        accelerator: Scales gradients and averages them over ranks.
        max_norm: The norm that a gradient is clipped to.
        has_norms: Measure the norm of each term's gradient wherever a point of the curve is due.

    Attributes:
        values: Terms, loss and gradient norm of the steps since the last point of the curve.
    """

    def __init__(
        self,
        distiller: Distiller,
        model: nn.Module,
        accelerator: Accelerator,
        *,
        max_norm: float,
        has_norms: bool,
    ) -> None:
        self.values = StepValues()
        self._norms: dict[str, float] = {}
        self._distiller, self._model, self._accelerator = distiller, model, accelerator
        self._max_norm = max_norm
        self._has_norms = has_norms
        self._by_term = TermGradients(distiller.student)

    def compute(self, batches: Sequence[Fed], state: TrainerState) -> None:
        """Add up the gradients of a step's batches.

        A term whose weight is 0 at this step has no count, so it is not computed.
        """
        objective, balance = self._distiller.objective, self._distiller.balance
        step = state.global_step
        weights = objective.weights_at(step, state.max_steps)
        # A step without any term still needs a graph to go backward through.
        weights = weights or dict.fromkeys(self._distiller.terms, 0.0)
        counts = self._counts(batches, [t for t in self._distiller.terms if t in weights])
        is_balanced = balance is not None and (
            step % objective.balance_every == 0 or balance.lacks(list(weights))
        )
        is_logged = self._has_norms and (
            (step + 1) % state.logging_steps == 0 or step + 1 == state.max_steps
        )
        factors: dict[str, float | Tensor] = dict(weights)
        if balance is not None:
            factors = {term: w * balance.factor(term) for term, w in weights.items()}
        self._model.train()
        for batch in batches:
            for i, piece in enumerate(batch.pieces):
                is_last = batch is batches[-1] and i == len(batch.pieces) - 1
                with nullcontext() if is_last else self._accelerator.no_sync(self._model):
                    self._add(piece, counts, factors, step + 1, apart=is_balanced or is_logged)
        if is_balanced or is_logged:
            norms = self._by_term.norms(self.over_ranks)
            if is_logged:
                self._norms = {term: float(factors[term]) * norm for term, norm in norms.items()}
            if is_balanced:
                assert balance is not None
                balance.update(norms)  # counts from the next step on

    def clip(self, state: TrainerState) -> Tensor:
        """Clip the gradient of the step; return its norm before."""
        norm = self._accelerator.clip_grad_norm_(self._model.parameters(), self._max_norm)
        assert norm is not None
        # In float16 a norm that is not finite is a step that the loss scaling skips.
        if self._accelerator.scaler is None:
            share = norm / self._accelerator.num_processes
            self.values.add(state.global_step + 1, {GRADIENT: share})
        return norm

    def take_norms(self) -> dict[str, float]:
        """Return the norm of each term's weighted gradient, once; empty if it is not measured."""
        norms, self._norms = self._norms, {}
        return norms

    def over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum over all ranks, each of which must ask for it."""
        total = self._accelerator.reduce(value, reduction="sum")
        assert isinstance(total, Tensor)
        return total

    def _add(
        self,
        piece: Batch,
        counts: Mapping[str, Count],
        factors: Mapping[str, float | Tensor],
        step: int,
        *,
        apart: bool,
    ) -> None:
        """Add the gradient and the values of a micro-batch."""
        losses = self._model(piece, counts, factors, apart=apart)
        self.values.add(step, {**losses.terms, LOSS: losses.total})
        if apart:
            scaler = self._accelerator.scaler
            self._by_term.add(losses.terms, 1.0 if scaler is None else scaler.get_scale())
        # Gradients are averaged over ranks, while the counts are already those of all.
        self._accelerator.backward(losses.total * self._accelerator.num_processes)

    def _counts(self, batches: Sequence[Fed], terms: Sequence[str]) -> Mapping[str, Count]:
        """Return the units of each term over all batches and ranks."""
        sums = [sum(batch.counts[term] for batch in batches) for term in terms]
        if self._accelerator.num_processes == 1:
            # Plain numbers: copying them to a GPU would wait for it.
            return dict(zip(terms, sums, strict=True))
        counts = self.over_ranks(torch.tensor(sums, device=self._accelerator.device))
        return dict(zip(terms, counts, strict=True))
