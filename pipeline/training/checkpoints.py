"""Checkpoints that count only when they are complete.

The last file that is written, after every other one is durable, is a marker, and a run goes on only
from a checkpoint that has it.
"""

import logging
import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import nn
from transformers import TrainerState

from pipeline.errors import IntegrityError, ResourceError
from pipeline.provenance import (
    fsync_directory,
    read_json,
    sync_tree,
    write_json,
)
from pipeline.store.lock import writer_lock

logger = logging.getLogger(__name__)
MARKER = "complete.json"
KEPT = 2
"""Checkpoints of a run that stay when a newer one is written, which is one of them."""


def begin_after(directory: Path, checkpoint: Path | None) -> None:
    """Remove what a run left beyond the checkpoint that this one goes on from.

    The checkpoints of the highest steps are kept: with those, which are not complete, this run's
    own would be removed as soon as they are written.
    """
    last = -1 if checkpoint is None else _step(checkpoint)
    for path in directory.glob("checkpoint-*"):
        if _step(path) > last:
            _remove(path)


def check_room(directory: Path, model: nn.Module, state: TrainerState) -> None:
    """Refuse to begin what the disk cannot hold: all checkpoints that will be there at once.

    Raises:
        ResourceError: With the bytes that are free and those needed.
    """
    there = len(list(directory.glob("checkpoint-*")))
    to_come = math.ceil((state.max_steps - state.global_step) / state.save_steps)
    # The next one is written before the oldest one goes.
    count = max(1, min(to_come, KEPT + 1 - there))
    needed = count * checkpoint_bytes(model)
    free = shutil.disk_usage(directory if directory.exists() else directory.parent).free
    if needed > free:
        raise ResourceError(
            f"{directory}: {free:,} bytes free, {count} checkpoints need about {needed:,} "
            "bytes; free space, train a smaller model, or fewer of its weights with lora"
        )


def mark_complete(checkpoint: Path, features: Mapping[str, str] | None = None) -> None:
    """Sync every file of a checkpoint, write its marker, then remove older checkpoints.

    By their steps: the time of writing would remove the newest where the clock was set back.

    Args:
        checkpoint: The checkpoint, written to its end.
        features: Signal to digest, what it was trained from; None where nothing of a store is used.
    """
    sync_tree(checkpoint)
    fsync_directory(checkpoint.parent)
    record = {} if features is None else {"features": dict(features)}
    write_json(checkpoint / MARKER, {"step": _step(checkpoint), **record})
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


def checkpoint_bytes(model: nn.Module) -> int:
    """Return about how large a checkpoint is: weights, and two moments of those that train."""
    return sum(
        p.numel() * p.element_size() * (3 if p.requires_grad else 1) for p in model.parameters()
    )


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
