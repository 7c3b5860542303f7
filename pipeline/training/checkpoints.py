"""Checkpoints that count only when they are whole, and a progress bar with an ETA.

`Trainer` takes the newest checkpoint directory, written to the end or not. Here the last thing
written, after every file is durable, is a marker, and only a checkpoint that has it is resumed
from.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed
from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.errors import IntegrityError
from pipeline.provenance import fsync_directory, write_json
from pipeline.store.lock import writer_lock

MARKER = "complete.json"


class CompletionMarker(TrainerCallback):
    """Marks each checkpoint as whole once all its files are durable."""

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Sync every file of the checkpoint, then write the marker."""
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every rank leaves its random state there
        if not state.is_world_process_zero:
            return
        assert args.output_dir is not None
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        for file in checkpoint.rglob("*"):
            if file.is_file():
                with file.open("rb") as descriptor:
                    os.fsync(descriptor.fileno())
        fsync_directory(checkpoint.parent)
        write_json(checkpoint / MARKER, {"step": state.global_step})


def last_complete_checkpoint(directory: Path) -> str | None:
    """Return the newest checkpoint with a marker, or None."""
    steps = [
        (int(path.parent.name.removeprefix("checkpoint-")), path.parent)
        for path in directory.glob(f"checkpoint-*/{MARKER}")
    ]
    return str(max(steps)[1]) if steps else None


@contextmanager
def checkpoint_lock(directory: Path) -> Iterator[None]:
    """Let one process at a time use a checkpoint directory; queued experiments share them."""
    path = directory.with_suffix(".lock")
    with writer_lock(path, what=f"the checkpoints {directory.name}"):
        try:
            yield
        finally:
            # Who waits sees that the file is gone and makes a new one.
            path.unlink(missing_ok=True)


class Progress(TrainerCallback):
    """One bar a run, on stderr, with steps, ETA and the latest loss.

    Stops a run whose loss is not finite.
    """

    def __init__(self, description: str) -> None:
        self._description = description
        self._bar: tqdm | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar at the step the run starts from."""
        if state.is_world_process_zero:
            self._bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                desc=self._description,
                unit="step",
                mininterval=1.0,
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Advance; the last step is always logged, so that a short run has a curve too."""
        if state.global_step >= state.max_steps:
            control.should_log = True
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss.

        Raises:
            IntegrityError: If the loss is not finite.
        """
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not math.isfinite(loss):
            raise IntegrityError(
                f"{self._description}: the loss is {loss} at step {state.global_step}; lower "
                "learning_rate or the terms' weights, then run the same command again"
            )
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4g}", refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self._bar is not None:
            self._bar.close()
