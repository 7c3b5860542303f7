"""Checkpoints that count only when they are whole.

`Trainer` takes the newest checkpoint directory, written to the end or not. Here the last thing
written, after every file is durable, is a marker, and only a checkpoint that has it is resumed
from.
"""

import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed
from transformers import (
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME

from pipeline.errors import IntegrityError, ResourceError
from pipeline.provenance import (
    fsync_directory,
    needing_room,
    read_json,
    sync_tree,
    write_json,
)
from pipeline.store.lock import writer_lock

logger = logging.getLogger(__name__)
MARKER = "complete.json"
KEPT = 2
"""Checkpoints of a run that stay when a newer one is written, which is one of them."""


class CompletionMarker(TrainerCallback):
    """Sees that there is room for checkpoints, and marks each as whole once its files are durable.

    `features`, signal to digest, is what it was trained from; it stands in the marker.
    """

    def __init__(self, features: Mapping[str, str] | None = None) -> None:
        self._record = {} if features is None else {"features": dict(features)}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to begin what the disk cannot hold: all checkpoints that will lie there at once.

        Raises:
            ResourceError: With the bytes that are free and those needed.
        """
        if not state.is_world_process_zero:
            return
        directory = Path(str(args.output_dir))
        there = len(list(directory.glob("checkpoint-*")))
        to_come = math.ceil((state.max_steps - state.global_step) / args.save_steps)
        # The next one is written before the oldest one goes.
        count = max(1, min(to_come, KEPT + 1 - there))
        needed = count * checkpoint_bytes(kwargs["model"])
        free = shutil.disk_usage(directory if directory.exists() else directory.parent).free
        if needed > free:
            raise ResourceError(
                f"{directory}: {free:,} bytes free, {count} checkpoints need about {needed:,} "
                "bytes; free space, train a smaller model, or fewer of its weights with lora"
            )

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Sync every file of the checkpoint, write the marker, then remove older checkpoints.

        By their steps: `Trainer` goes by the time of writing, and where the clock was set back it
        would remove the newest.
        """
        if torch.distributed.is_initialized():
            torch.distributed.barrier()  # every rank leaves its random state there
        if not state.is_world_process_zero:
            return
        assert args.output_dir is not None
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        sync_tree(checkpoint)
        fsync_directory(checkpoint.parent)
        write_json(checkpoint / MARKER, {"step": state.global_step, **self._record})
        for path in sorted(checkpoint.parent.glob("checkpoint-*"), key=_step)[:-KEPT]:
            _remove(path)


def last_complete_checkpoint(
    directory: Path, features: Mapping[str, str] | None = None
) -> str | None:
    """Return the newest checkpoint with a marker, or None.

    Args:
        directory: The checkpoints of one run.
        features: Signal to digest; a checkpoint that was trained from others is passed over, and a
            line of the log says why. None where nothing of a store is used.
    """
    steps = [(_step(path.parent), path.parent) for path in directory.glob(f"checkpoint-*/{MARKER}")]
    for _, checkpoint in sorted(steps, reverse=True):
        reason = None if features is None else _unfit(checkpoint / MARKER, features)
        if reason is None:
            return str(checkpoint)
        logger.warning("%s is not gone on from: %s", checkpoint, reason)
    return None


def _unfit(marker: Path, features: Mapping[str, str]) -> str | None:
    """Say why a checkpoint does not fit the signals; None if it does."""
    try:
        record = read_json(marker)
    except IntegrityError as error:
        return str(error)
    found = record.get("features") if isinstance(record, dict) else None
    if not isinstance(found, dict):
        return "it does not say which signals it was trained from"
    for name in sorted({*found, *features}):
        if found.get(name) != features.get(name):
            theirs, ours = (str(one.get(name, "none"))[:16] for one in (found, features))
            return f"it was trained from {name} {theirs}, expected {ours}"
    return None


def train_from(trainer: Trainer, checkpoint: str | None) -> None:
    """Train to the end, from a checkpoint where there is one.

    From a checkpoint of the last step `Trainer` would take one more: a run that was killed after it
    would end with other weights. Here its weights and its log are loaded, and that is all.

    Raises:
        ResourceError: If there is no room for a checkpoint.
    """
    if checkpoint is not None:
        state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))
        if state.global_step >= state.max_steps:
            trainer._load_from_checkpoint(checkpoint)
            trainer.state = state
            return
    directory = Path(str(trainer.args.output_dir))
    if trainer.is_world_process_zero():
        _remove_after(directory, checkpoint)
    with needing_room(directory, checkpoint_bytes(trainer.model)):
        trainer.train(resume_from_checkpoint=checkpoint)


def checkpoint_bytes(model: Any) -> int:
    """Return about how large a checkpoint is: weights, and two moments of those that train."""
    return sum(
        p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in model.parameters()
    )


def _remove_after(directory: Path, checkpoint: str | None) -> None:
    """Remove what a run left beyond the checkpoint that this one goes on from.

    The checkpoints of the highest steps are kept: with those, which are not whole, this run's own
    would be removed as soon as they are written.
    """
    last = -1 if checkpoint is None else _step(Path(checkpoint))
    for path in directory.glob("checkpoint-*"):
        if _step(path) > last:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    """Remove one; half a removal leaves none that would be gone on from."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("checkpoint-"))


def remove_checkpoints(directory: Path) -> None:
    """Remove a run's checkpoints; half a removal leaves none that would be gone on from."""
    for marker in directory.glob(f"checkpoint-*/{MARKER}"):
        marker.unlink()
        fsync_directory(marker.parent)
    shutil.rmtree(directory, ignore_errors=True)


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
