"""`transformers.Trainer` where distillation differs: batches from a store, a loss of several terms.

Each term is divided by its own count over all accumulation steps and ranks, and logged apart. The
order of batches is known before anything is read, so resuming skips without decoding.
"""

import logging
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_model, save_model
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import SAFE_WEIGHTS_NAME

from pipeline.student.distiller import Distiller, term_counts
from pipeline.student.stream import BatchOrder, StoreDataset
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
            callbacks=[CompletionMarker(), Progress(description), _Epochs(order, dataset)],
        )
        self.remove_callback(PrinterCallback)
        self.distiller = distiller
        self._order = order
        self._dataset = dataset
        self._gradient_norms = gradient_norms
        self._logged_step = 0
        self._sums: dict[str, Tensor] = {}
        self._gradients: dict[str, Tensor] = {}

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader; its batch sampler lets `accelerate` skip without decoding.

        `accelerate` does not prepare it: its way of sharding drops or repeats examples when a
        short batch is not the last one, and `BatchOrder` knows the ranks.
        """
        return DataLoader(
            self._dataset,
            batch_sampler=self._order,
            collate_fn=_as_it_is,
            pin_memory=self.args.dataloader_pin_memory,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the micro-batches of one step with the counts of their terms, over all ranks."""
        samples = list(islice(epoch_iterator, num_batches))
        totals = dict.fromkeys(self.distiller.terms, 0)
        for sample in samples:
            found = term_counts(sample, self.distiller.objective, task=self.distiller.task)
            for term in totals:
                totals[term] += found[term]
        counts = torch.tensor(list(totals.values()), device=device)
        counts = self.accelerator.reduce(counts, reduction="sum")
        return samples, dict(zip(totals, counts, strict=True))

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
        terms = model(inputs, num_items_in_batch)
        progress = self.state.global_step / max(1, self.state.max_steps)
        objective = self.distiller.objective
        weighted = {
            term: getattr(objective, term).weight.weight_at(progress) * value
            for term, value in terms.items()
        }
        if self._gradient_norms and (self.state.global_step + 1) % self.args.logging_steps == 0:
            self._add_gradients(weighted)
        for term, value in terms.items():
            self._sums[term] = self._sums.get(term, 0) + value.detach()
        total = torch.stack(list(weighted.values())).sum() * self.accelerator.num_processes
        return (total, terms) if return_outputs else total

    def _add_gradients(self, weighted: Mapping[str, Tensor]) -> None:
        """Add each weighted term's gradient in the student to those of the step's micro-batches."""
        parameters = [p for p in self.distiller.student.parameters() if p.requires_grad]
        for term, value in weighted.items():
            found = torch.autograd.grad(
                value, parameters, retain_graph=True, materialize_grads=True
            )
            flat = torch.cat([gradient.detach().flatten() for gradient in found])
            self._gradients[term] = self._gradients.get(term, 0) + flat

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every term's mean since the last log, and gradient norms where asked for."""
        if "loss" in logs:
            steps = self.state.global_step - self._logged_step
            for term, total in self._sums.items():
                value: Any = self.accelerator.reduce(total, reduction="sum")
                logs[term] = float(value) / max(1, steps)
            for term, gradient in self._gradients.items():
                whole: Any = self.accelerator.reduce(gradient, reduction="sum")
                logs[f"gradient_{term}"] = float(whole.norm())
            if self._gradients and self.is_world_process_zero():
                norms = ", ".join(f"{t} {logs[f'gradient_{t}']:.3g}" for t in self._gradients)
                logger.info("step %d, gradient norms: %s", self.state.global_step, norms)
            self._sums, self._gradients = {}, {}
            self._logged_step = self.state.global_step
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Write student and projectors; `save_model` knows tied weights. Nothing is pickled."""
        directory = Path(output_dir or str(self.args.output_dir))
        directory.mkdir(parents=True, exist_ok=True)
        save_model(self.distiller, str(directory / SAFE_WEIGHTS_NAME))

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        self._logged_step = int(resume_from_checkpoint.rsplit("-", 1)[1])
        load_model(self.distiller, str(Path(resume_from_checkpoint) / SAFE_WEIGHTS_NAME))


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
