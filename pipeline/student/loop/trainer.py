"""`transformers.Trainer` where distillation differs: batches from a store, a loss of several terms.

Each term is divided by its own count over all accumulation steps and ranks, and logged apart. The
order of batches is known before anything is read, so resuming skips without decoding.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainingArguments, get_scheduler
from transformers.utils import SAFE_WEIGHTS_NAME

from pipeline.student.align.distiller import Distiller, term_counts
from pipeline.student.align.term_gradients import TermGradients
from pipeline.student.data.batch_order import BatchOrder
from pipeline.student.data.feed import Feed
from pipeline.student.data.stream import StoreDataset
from pipeline.student.loop.callbacks import Epochs, Pins
from pipeline.training.checkpoints import CompletionMarker
from pipeline.training.watched import WatchedTrainer

logger = logging.getLogger(__name__)


class DistillationTrainer(WatchedTrainer):
    """Trains a `Distiller` on the examples of a store.

    Args:
        distiller: Student and projectors.
        dataset: Where examples are looked up.
        order: Which of them run together.
        args: How it is trained.
        description: What is trained, for the bar and for errors.
        gradient_norms: Log the norm of each term's gradient.
        piece_size: Examples that are on the device together at most; a batch of more goes through
            in micro-batches, to the same gradient. None for whole batches.
        reports: Called with all that is logged.
        between_steps: Called before each step.
    """

    loss_is_scaled_for_ga = True  # the terms are divided by counts over all micro-batches

    def __init__(
        self,
        distiller: Distiller,
        dataset: StoreDataset,
        order: BatchOrder,
        args: TrainingArguments,
        *,
        description: str,
        gradient_norms: bool = False,
        piece_size: int | None = None,
        reports: Sequence[TrainerCallback] = (),
        between_steps: Callable[[], None] | None = None,
    ) -> None:
        self._tokens = 0
        super().__init__(
            description=description,
            tokens=lambda: self._tokens,
            model=distiller,
            args=args,
            train_dataset=dataset,
            callbacks=[
                Pins(dataset),
                CompletionMarker(dataset.reader.pins),
                Epochs(order, dataset),
            ],
            reports=reports,
        )
        self.distiller = distiller
        self._order = order
        self._dataset = dataset
        self._feed = Feed(
            dataset,
            args.device,
            partial(term_counts, objective=distiller.objective, task=distiller.task),
            piece_size=piece_size,
        )
        self._has_gradient_norms = gradient_norms
        self._between_steps = between_steps
        self._weights: dict[str, float] = {}
        self._pieces_to_come = 0
        self._is_measured = False
        self._is_logged = False
        self._gradients = TermGradients(distiller.student)
        self._norms: dict[str, float] = {}

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does; reading ahead stops however it ends."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self._feed.close()

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Return the learning rate's schedule; with phases, one after the other.

        Each phase has the whole schedule over its own steps, warm-up included. The optimiser's
        moments go on: they are the student's, whose weights go on too.
        """
        phases = self.distiller.objective.phases
        if phases is None or self.lr_scheduler is not None or num_training_steps < 2:
            return super().create_scheduler(num_training_steps, optimizer)
        first_steps = phases.first_steps(num_training_steps)
        first, second = (
            self._shape(steps) for steps in (first_steps, num_training_steps - first_steps)
        )

        def rate(step: int) -> float:
            # Cosine's last is a whole 0.
            return float(first(step) if step < first_steps else second(step - first_steps))

        chosen: Any = optimizer or self.optimizer
        self.lr_scheduler = LambdaLR(chosen, rate)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def _shape(self, steps: int) -> Callable[[int], float]:
        """Return the factor of the learning rate by step of one schedule."""
        unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)
        options: Any = self.args.lr_scheduler_kwargs
        found: Any = get_scheduler(
            self.args.lr_scheduler_type,
            optimizer=unused,
            num_warmup_steps=self.warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=options,
        )
        return found.lr_lambdas[0]

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader of which examples run together; the feed looks them up.

        So `Trainer` skips what a resumed run has seen without reading it. `accelerate` does not
        prepare it: its way of sharding drops or repeats examples when a short batch is not the last
        one, and `BatchOrder` knows the ranks.
        """
        members: Any = range(len(self._dataset))
        return DataLoader(members, batch_sampler=self._order, collate_fn=_as_it_is)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the batches of one step with the counts of their terms, over all ranks.

        A term whose weight is 0 at this step has no count, so it is not computed.
        """
        if self._between_steps is not None:
            self._between_steps()
        samples = self._feed.take(epoch_iterator, num_batches)
        self._tokens += sum(sample.tokens for sample in samples)
        objective, balance = self.distiller.objective, self.distiller.balance
        done, steps = self.state.global_step, self.state.max_steps
        self._weights = objective.weights_at(done, steps)
        # A step without any term still needs a graph to go backward through.
        self._weights = self._weights or dict.fromkeys(self.distiller.terms, 0.0)
        self._pieces_to_come = sum(len(sample.pieces) for sample in samples)
        self._is_measured = balance is not None and (
            done % objective.balance_every == 0 or balance.lacks(list(self._weights))
        )
        self._is_logged = self._has_gradient_norms and (
            (done + 1) % self.args.logging_steps == 0 or done + 1 == steps
        )
        on = [term for term in self.distiller.terms if term in self._weights]
        sums = [sum(sample.counts[term] for sample in samples) for term in on]
        counts = self.over_ranks(torch.tensor(sums, device=device))
        return samples, dict(zip(on, counts, strict=True))

    def floating_point_ops(self, inputs: Any) -> int:
        """Return 0: `Trainer` counts by a model's inputs, and here a batch is in pieces."""
        return 0

    def training_step(
        self,
        model: nn.Module,
        inputs: Any,  # a Fed
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Add the gradients of a batch, micro-batch by micro-batch; return its loss."""
        losses = []
        for i, piece in enumerate(inputs.pieces):
            is_last = i == len(inputs.pieces) - 1
            with nullcontext() if is_last else self.accelerator.no_sync(model):
                losses.append(super().training_step(model, piece, num_items_in_batch))
        return torch.stack(losses).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Mapping[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the weighted sum of the terms.

        On several ranks it is multiplied by their number, because gradients are averaged over ranks
        while the counts are already those of all.
        """
        factors: dict[str, Any] = dict(self._weights)
        if self.distiller.balance is not None:
            factors = {t: w * self.distiller.balance.factor(t) for t, w in factors.items()}
        is_apart = self._is_logged or self._is_measured
        losses = model(inputs, num_items_in_batch, factors, apart=is_apart)
        self.note(**losses.terms)
        self._pieces_to_come -= 1
        if is_apart:
            scaler = getattr(self.accelerator, "scaler", None)
            self._gradients.add(losses.terms, 1.0 if scaler is None else scaler.get_scale())
            if self._pieces_to_come == 0:
                self._measure(factors)
        total = losses.total * self.accelerator.num_processes
        return (total, losses.terms) if return_outputs else total

    def _measure(self, factors: Mapping[str, Any]) -> None:
        """Take in the gradients of the whole step, of all ranks.

        Within the step's last micro-batch: its checkpoint must hold the new factors, which count
        from the next step on.
        """
        norms = self._gradients.norms(self.over_ranks)
        if self._is_logged:
            self._norms = {term: float(factors[term]) * norm for term, norm in norms.items()}
        if self._is_measured:
            assert self.distiller.balance is not None
            self.distiller.balance.update(norms)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log every term's mean over the steps at which it was on; norms and factors beside."""
        if "loss" in logs:
            logs |= {f"gradient_{term}": norm for term, norm in self._norms.items()}
            if self._norms and self.is_world_process_zero():
                norms = ", ".join(f"{term} {norm:.3g}" for term, norm in self._norms.items())
                logger.info("step %d, gradient norms: %s", self.state.global_step, norms)
            self._norms = {}
            if self.distiller.balance is not None:
                for term in self.distiller.terms:
                    logs[f"factor_{term}"] = float(self.distiller.balance.factor(term))
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write student and projectors; `save_model` knows tied weights. Nothing is pickled."""
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        save_model(self.distiller, str(directory / SAFE_WEIGHTS_NAME))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        load_model(self.distiller, str(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME))


def _as_it_is(batch: Any) -> Any:
    return batch
