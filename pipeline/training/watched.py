"""`transformers.Trainer` that can be watched: values of every step, tokens a second, peak memory.

It stops at the first value that is not finite, before a checkpoint of it could count.
"""

import logging
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from pipeline.errors import IntegrityError, in_short
from pipeline.training.interrupts import INTERRUPTS, StopAtInterrupt
from pipeline.training.progress import PACE, Progress
from pipeline.training.values import GRADIENT, LOSS, StepValues, check_finite, means

logger = logging.getLogger(__name__)
SMALLEST_SCALE = 2.0**-8
"""Of float16's gradients: it starts at 65,536 and is halved at each gradient that is not finite, so
one that would overflow even here has no end."""


class WatchedTrainer(Trainer):
    """Logs means over the steps since the last log, exactly so after resuming.

    Args:
        description: What is trained, for the bar and for errors.
        tokens: Tokens that this process has trained on so far.
        args: How it is trained.
        callbacks: Called before the bar.
        reports: Called after it, with all that is logged.
        more: Of `Trainer`.
    """

    def __init__(
        self,
        *,
        description: str,
        tokens: Callable[[], int],
        args: TrainingArguments,
        callbacks: Sequence[TrainerCallback],
        reports: Sequence[TrainerCallback] = (),
        **more: Any,
    ) -> None:
        self._description = description
        self._progress = Progress(description, tokens)
        self._reports = list(reports)
        self._values = StepValues()
        self._stop = StopAtInterrupt()
        callbacks = [*callbacks, self._progress, self._stop, *self._reports]
        super().__init__(args=args, callbacks=callbacks, **more)
        self.remove_callback(PrinterCallback)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as `Trainer` does; however it ends, bar and reports are closed.

        A run that stops because it diverged is the one whose curve is looked at.

        Raises:
            Interrupted: If a signal came; the checkpoint of the last step is written.
        """
        try:
            with INTERRUPTS.heeded():
                found = super().train(*args, **kwargs)
        except BaseException:
            for report in self._reports:
                try:
                    report.on_train_end(self.args, self.state, self.control, model=self.model)
                except Exception as error:  # noqa: BLE001 (the run's own is the one to tell)
                    logger.warning("%s: not closed (%s)", type(report).__name__, in_short(error))
            raise
        finally:
            self._progress.close()
        self._stop.check(self.state.global_step)
        return found

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Return the learning rate's schedule."""
        if num_training_steps == 1:
            self.args.warmup_steps = self.warmup_steps(1)
        return super().create_scheduler(num_training_steps, optimizer)

    def warmup_steps(self, steps: int) -> int:
        """Return the steps of warm-up; none in a run of one step, whose rate it would make 0."""
        return self.args.get_warmup_steps(steps) if steps > 1 else 0

    def note(self, **values: Tensor) -> None:
        """Add values of a micro-batch to the current step's; over ranks they are summed."""
        self._values.add(self.state.global_step + 1, values)

    def over_ranks(self, value: Tensor) -> Tensor:
        """Return the sum over all ranks, each of which must ask for it."""
        found: Any = self.accelerator.reduce(value, reduction="sum")
        return found

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Add the gradient of a micro-batch; return its loss, times the number of ranks."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.note(**{LOSS: loss / self.accelerator.num_processes})
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        # In float16 a norm that is not finite is a step that the loss scaling skips.
        if not self.args.fp16:
            self.note(**{GRADIENT: norm / self.accelerator.num_processes})
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means of all that was noted, the pace, and at the end the peak of memory.

        Raises:
            IntegrityError: If something is not finite.
        """
        if LOSS in logs:
            found = means(self._read())
            self._values.clear()
            self._check_scale()
            found.pop(GRADIENT, None)  # `Trainer` logs that of the last step
            logs |= found
            logs[PACE] = self._progress.pace() * self.accelerator.num_processes
        elif "train_runtime" in logs:
            peak = peak_memory_bytes(self.args.device)
            logs["peak_memory_bytes"] = peak
            self._progress.close()
            if self.is_world_process_zero():
                where = self.args.device
                logger.info("%s: peak memory %.2f GB (%s)", self._description, peak / 1e9, where)
        super().log(logs, start_time)

    def _read(self) -> dict[int, dict[str, float]]:
        found = self._values.read(self.over_ranks)
        check_finite(found, self._description)
        return found

    def _check_scale(self) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if scaler is not None and scaler.get_scale() < SMALLEST_SCALE:
            raise IntegrityError(
                f"{self._description}: the gradient is not finite in float16 at any scale, at step "
                f"{self.state.global_step}; set precision to bfloat16 or float32, or lower "
                "learning_rate, then run the same command again"
            )

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save what is finite; what no point of the curve holds yet goes with it."""
        self._read()
        super()._save_checkpoint(model, trial)
        directory = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
        self._values.save(self._values_in(directory))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self._values.load(self._values_in(Path(checkpoint)), self.args.device)

    def _values_in(self, checkpoint: Path) -> Path:
        return checkpoint / f"values_{self.args.process_index}.safetensors"


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that tensors held on a GPU, or that the process held on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
