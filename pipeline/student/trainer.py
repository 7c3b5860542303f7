"""`transformers.Trainer` where distillation differs: batches from a store, a loss of several terms.

Each term is divided by its own count over all accumulation steps and ranks, and logged apart. The
order of batches is known before anything is read, so resuming skips without decoding.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from pipeline.student.distiller import Distiller, term_counts
from pipeline.student.feed import Feed
from pipeline.student.order import BatchOrder
from pipeline.student.stream import StoreDataset
from pipeline.training.checkpoints import CompletionMarker, Progress

logger = logging.getLogger(__name__)


class DistillationTrainer(Trainer):
    """Trains a `Distiller` on the examples of a store."""

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
    ) -> None:
        super().__init__(
            model=distiller,
            args=args,
            train_dataset=dataset,
            callbacks=[
                _Pins(dataset),
                CompletionMarker(dataset.reader.pins),
                Progress(description),
                _Epochs(order, dataset),
            ],
        )
        self.remove_callback(PrinterCallback)
        self.distiller = distiller
        self._order = order
        self._dataset = dataset
        self._feed = Feed(
            dataset,
            args.device,
            partial(term_counts, objective=distiller.objective, task=distiller.task),
        )
        self._gradient_norms = gradient_norms
        self._weights: dict[str, float] = {}
        self._pieces_to_come = 0
        self._is_measured = False
        self._sums: dict[str, Tensor] = {}
        self._steps: dict[str, int] = {}
        self._gradients: dict[str, Tensor] = {}
        self._unweighted: dict[str, Tensor] = {}

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
            return first(step) if step < first_steps else second(step - first_steps)

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
            num_warmup_steps=self.args.get_warmup_steps(steps),
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
        samples = self._feed.take(epoch_iterator, num_batches)
        objective, balance = self.distiller.objective, self.distiller.balance
        self._weights = objective.weights_at(self.state.global_step, self.state.max_steps)
        # A step without any term still needs a graph to go backward through.
        self._weights = self._weights or dict.fromkeys(self.distiller.terms, 0.0)
        self._pieces_to_come = sum(len(sample.pieces) for sample in samples)
        self._is_measured = balance is not None and (
            self.state.global_step % objective.balance_every == 0
            or balance.lacks(list(self._weights))
        )
        on = [term for term in self.distiller.terms if term in self._weights]
        for term in on:
            self._steps[term] = self._steps.get(term, 0) + bool(samples)
        sums = [sum(sample.counts[term] for sample in samples) for term in on]
        counts = self.accelerator.reduce(torch.tensor(sums, device=device), reduction="sum")
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
        is_logged = self._gradient_norms and (
            (self.state.global_step + 1) % self.args.logging_steps == 0
        )
        is_apart = is_logged or self._is_measured
        losses = model(inputs, num_items_in_batch, factors, apart=is_apart)
        if is_apart:
            self._add_gradients(losses.terms, factors, is_logged=is_logged)
        for term, value in losses.terms.items():
            self._sums[term] = self._sums.get(term, 0) + value.detach()
        total = losses.total * self.accelerator.num_processes
        self._pieces_to_come -= 1
        if self._is_measured and self._pieces_to_come == 0:
            self._rebalance()
        return (total, losses.terms) if return_outputs else total

    def _add_gradients(
        self, terms: Mapping[str, Tensor], factors: Mapping[str, Any], *, is_logged: bool
    ) -> None:
        """Add each term's gradient in the student to those of the step's micro-batches."""
        parameters = [p for p in self.distiller.student.parameters() if p.requires_grad]
        for term, value in terms.items():
            found = torch.autograd.grad(
                value, parameters, retain_graph=True, materialize_grads=True
            )
            flat = torch.cat([gradient.detach().flatten() for gradient in found])
            if self._is_measured:
                self._unweighted[term] = self._unweighted.get(term, 0) + flat
            if is_logged:
                self._gradients[term] = self._gradients.get(term, 0) + factors[term] * flat

    def _rebalance(self) -> None:
        """Take in the gradients of the whole step, of all ranks; they count from the next one on.

        Within the step's last micro-batch: its checkpoint must hold the new factors.
        """
        balance = self.distiller.balance
        assert balance is not None
        measured = {}
        for term, gradient in self._unweighted.items():
            whole: Any = self.accelerator.reduce(gradient, reduction="sum")
            measured[term] = float(whole.norm())
        balance.update(measured)
        self._unweighted = {}

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every term's mean since the last log, and gradient norms where asked for.

        The mean is over the steps at which the term was on; without any it is left out.
        """
        if "loss" in logs:
            for term, total in self._sums.items():
                value: Any = self.accelerator.reduce(total, reduction="sum")
                logs[term] = float(value) / max(1, self._steps[term])
            for term, gradient in self._gradients.items():
                whole: Any = self.accelerator.reduce(gradient, reduction="sum")
                logs[f"gradient_{term}"] = float(whole.norm())
            if self._gradients and self.is_world_process_zero():
                norms = ", ".join(f"{t} {logs[f'gradient_{t}']:.3g}" for t in self._gradients)
                logger.info("step %d, gradient norms: %s", self.state.global_step, norms)
            if self.distiller.balance is not None:
                for term in self.distiller.terms:
                    logs[f"factor_{term}"] = float(self.distiller.balance.factor(term))
            self._sums, self._steps, self._gradients = {}, {}, {}
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


class _Pins(TrainerCallback):
    """Stops a run whose signals are no longer those it was started with."""

    def __init__(self, dataset: StoreDataset) -> None:
        self._reader = dataset.reader

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._reader.check_pins()


class _Epochs(TrainerCallback):
    """Tells the order which epoch begins, and the dataset what to read ahead.

    The epoch is counted in steps, as `Trainer` itself does when it resumes. It hands epochs on
    too, but not through every wrapper of a sampler.
    """

    def __init__(self, order: BatchOrder, dataset: StoreDataset) -> None:
        self._order = order
        self._dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = -(-len(self._order) // args.gradient_accumulation_steps)
        self._order.set_epoch(state.global_step // steps)
        self._dataset.read_ahead(self._order.segment_order())


def _as_it_is(batch: Any) -> Any:
    return batch
