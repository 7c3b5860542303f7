"""`transformers.Trainer` where distillation differs: batches from a store, a loss of several terms.

Each term is divided by its own count over all accumulation steps and ranks, and logged apart. The
order of batches is known before anything is read, so resuming skips without decoding.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
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


class DistillationTrainer(Trainer):
    """Trains a `Distiller` on the examples of a store."""

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
        # The loss is already divided by counts over the accumulation; Trainer must not divide
        # again.
        self.model_accepts_loss_kwargs = True
        self.distiller = distiller
        self._order = order
        self._dataset = dataset
        self._gradient_norms = gradient_norms
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=args.device))
        self._norms: dict[str, float] = {}

    def get_train_dataloader(self) -> DataLoader:
        """Return the loader; its batch sampler lets `accelerate` skip without decoding."""
        loader = DataLoader(
            self._dataset,
            batch_sampler=self._order,
            collate_fn=_as_it_is,
            pin_memory=self.args.dataloader_pin_memory,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the micro-batches of one step with the counts of their terms, over all ranks."""
        samples = []
        for _ in range(num_batches):
            try:
                samples.append(next(epoch_iterator))
            except StopIteration:
                break
        totals = dict.fromkeys(self.distiller.terms, 0)
        for sample in samples:
            found = term_counts(sample, self.distiller.objective, task=self.distiller.task)
            for term in totals:
                totals[term] += found[term]
        counts = torch.tensor(list(totals.values()), dtype=torch.float32, device=device)
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
            self._measure_gradients(weighted)
        for term, value in terms.items():
            self._sums[term] = self._sums[term] + value.detach()
        total = torch.stack(list(weighted.values())).sum() * self.accelerator.num_processes
        return (total, terms) if return_outputs else total

    def _measure_gradients(self, weighted: Mapping[str, Tensor]) -> None:
        """Keep the norm of each weighted term's gradient in the student, for the next log."""
        parameters = [p for p in self.distiller.student.parameters() if p.requires_grad]
        for term, value in weighted.items():
            gradients = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            squares = [g.float().square().sum() for g in gradients if g is not None]
            self._norms[f"gradient_{term}"] = float(torch.stack(squares).sum().sqrt())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add every term's mean since the last log, and gradient norms where asked for."""
        if "loss" in logs:
            steps = self.state.global_step - self._logged_step
            for term, total in self._sums.items():
                value: Any = self.accelerator.reduce(total, reduction="sum")
                logs[term] = float(value) / max(1, steps)
            self._sums.clear()
            logs |= self._norms
            self._norms = {}
            self._logged_step = self.state.global_step
        super().log(logs, start_time)

    _logged_step = 0

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
    """Tells the order which epoch begins, and the dataset what to read ahead."""

    def __init__(self, order: BatchOrder, dataset: StoreDataset) -> None:
        self._order = order
        self._dataset = dataset

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The state counts epochs as a float that may fall short of a whole number by rounding.
        self._order.set_epoch(
            round(state.epoch or 0) if _is_whole(state.epoch) else int(state.epoch or 0)
        )
        self._dataset.read_ahead(self._order.segment_order().tolist())


def _is_whole(epoch: float | None) -> bool:
    return epoch is None or abs(epoch - round(epoch)) < 1e-6


def _as_it_is(batch: Any) -> Any:
    return batch
