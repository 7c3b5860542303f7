"""`transformers.Trainer` that can be watched: values of every step, tokens a second, peak memory.

It stops at the first value that is not finite, before a checkpoint of it could count.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from pipeline.provenance import needing_room
from pipeline.training.arguments import warmup_steps
from pipeline.training.checkpoints import (
    begin_after,
    check_room,
    checkpoint_bytes,
    mark_complete,
)
from pipeline.training.interrupts import INTERRUPTS, Stop
from pipeline.training.memory import peak_memory_bytes
from pipeline.training.progress import PACE, Progress
from pipeline.training.values import (
    GRADIENT,
    LOSS,
    StepValues,
    check_finite,
    check_scale,
    means,
)

logger = logging.getLogger(__name__)
VALUES = "values_0.safetensors"


class WatchedTrainer(Trainer):
    """Logs means over the steps since the last log, exactly so after resuming.

    Args:
        description: What is trained, for the bar and for errors.
        tokens: Tokens that this process has trained on so far.
        args: How it is trained.
        more: Of `Trainer`.
    """

    def __init__(
        self,
        *,
        description: str,
        tokens: Callable[[], int],
        args: TrainingArguments,
        **more: Any,
    ) -> None:
        self._description = description
        self._progress = Progress(description)
        self._values = StepValues()
        self._stop = Stop(1)
        super().__init__(args=args, **more)
        self.add_callback(_Watch(self._progress, self._stop, tokens, self.check, self._values))
        self.remove_callback(PrinterCallback)

    def train_from(self, checkpoint: Path | None) -> None:
        """Train to the end, from a checkpoint where there is one.

        From a checkpoint of the last step `Trainer` would take one more: a run that was killed
        after it would end with other weights. Here its weights are loaded, and that is all.

        Raises:
            IntegrityError: If a value is not finite.
            Interrupted: If a signal came; the checkpoint of the last step is written.
            ResourceError: If there is no room for a checkpoint.
        """
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            if state.global_step >= state.max_steps:
                self._load_from_checkpoint(str(checkpoint))
                self.state = state
                return
            self._values.load(checkpoint / VALUES, self.args.device)
        directory = Path(str(self.args.output_dir))
        begin_after(directory, checkpoint)
        model: Any = self.model
        try:
            with INTERRUPTS.heeded(), needing_room(directory, checkpoint_bytes(model)):
                self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            self._progress.close()
        self._stop.check(self.state.global_step)

    def check(self) -> dict[int, dict[str, float]]:
        """Return the values of the steps since the last log.

        Raises:
            IntegrityError: If one is not finite.
        """
        values = self._values.read(lambda value: value)
        check_finite(values, self._description)
        return values

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> Any:
        """Return the learning rate's schedule."""
        self.args.warmup_steps = warmup_steps(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, optimizer)

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """Add the gradient of a micro-batch; return its loss."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._values.add(self.state.global_step + 1, {LOSS: loss})
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm: Any = super()._clip_grad_norm(model)
        # In float16 a norm that is not finite is a step that the loss scaling skips.
        if not self.args.fp16:
            self._values.add(self.state.global_step + 1, {GRADIENT: norm})
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with the means of all that was noted, the pace, and at the end the peak of memory.

        Raises:
            IntegrityError: If something is not finite.
        """
        if LOSS in logs:
            logs[LOSS] = means(self.check()).get(LOSS, logs[LOSS])
            self._values.clear()
            scaler = getattr(self.accelerator, "scaler", None)
            check_scale(scaler, self._description, self.state.global_step)
            logs[PACE] = self._progress.pace()
            self._progress.show(logs[LOSS], logs[PACE])
        elif "train_runtime" in logs:
            peak = peak_memory_bytes(self.args.device)
            logs["peak_memory_bytes"] = peak
            self._progress.close()
            where = self.args.device
            logger.info("%s: peak memory %.2f GB (%s)", self._description, peak / 1e9, where)
        super().log(logs, start_time)


class _Watch(TrainerCallback):
    """Shows a run, ends it at an interrupt, and sees that its checkpoints are complete and finite.

    Args:
        progress: The bar.
        stop: Whether the run is to end.
        tokens: Tokens that this process has trained on so far.
        check: Refuses values that are not finite.
        values: What no log holds yet.
    """

    def __init__(
        self,
        progress: Progress,
        stop: Stop,
        tokens: Callable[[], int],
        check: Callable[[], Any],
        values: StepValues,
    ) -> None:
        self._progress, self._stop, self._tokens = progress, stop, tokens
        self._check, self._values = check, values

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Look for the room that checkpoints need; open the bar."""
        check_room(Path(str(args.output_dir)), kwargs["model"], state)
        self._progress.open(state.global_step, state.max_steps, is_shown=True)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance; the last step is always logged, so that a short run has a curve too."""
        self._progress.advance(state.global_step, self._tokens())
        control.should_log |= state.global_step >= state.max_steps
        if self._stop.is_asked():
            control.should_save = control.should_training_stop = True
        if control.should_save:
            self._check()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Complete the checkpoint that `Trainer` has written."""
        checkpoint = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        self._values.save(checkpoint / VALUES)
        mark_complete(checkpoint)
