"""The largest micro-batch that fits into memory, found by a trial before the first step.

The trial runs the most expensive batch possible forward and backward: copies of the longest
example, with its real features and every term that is ever on. If it does not fit, its size is
halved. The size is recorded next to the checkpoints, so that a resumed run uses the same one.

Micro-batches add up to the gradient of the batch, except for rounding. With dropout they draw other
masks.
"""

import gc
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed

from pipeline.errors import IntegrityError, ResourceError, is_out_of_memory
from pipeline.provenance import read_json, write_json
from pipeline.student.align.distiller import Distiller, term_counts
from pipeline.student.data.feed import Fed, Feed, tensors_of
from pipeline.student.data.stream import StoreDataset
from pipeline.student.loop.random_state import RandomState
from pipeline.training.options import HALF

logger = logging.getLogger(__name__)
KEY = "micro_batch_size"
MOMENTS = 2
"""Values that AdamW keeps for each weight; no other optimiser on offer keeps more."""
RESERVE = 0.05
"""Share of a GPU's memory that stays free, for gaps in its allocator and for the optimiser."""


def held_bytes(distiller: Distiller, *, ranks: int) -> int:
    """Return the bytes that a student holds on its device between two steps, without its weights.

    These are the optimiser's moments and, on several ranks, the buckets of gradients.
    """
    trained = sum(p.numel() * p.element_size() for p in distiller.parameters() if p.requires_grad)
    return trained * (MOMENTS + (ranks > 1))


def settle_micro_batch(
    fits: Callable[[int], bool],
    batch_size: int,
    *,
    name: str,
    record: Path,
    device: torch.device,
) -> int:
    """Return the micro-batch size that is recorded, or the first that fits of batch and halves.

    All ranks use the smallest size that one of them finds.

    Args:
        fits: Tells whether a number of the longest examples run at once.
        batch_size: Examples in a batch.
        name: The student's name.
        record: The file that keeps the size.
        device: Where the student trains.

    Raises:
        ResourceError: If not even one example fits.
    """
    known = _smallest(_recorded(record, batch_size), device)
    if known:
        return known
    size = batch_size
    while size and not fits(size):
        size //= 2
    size = _smallest(size, device)
    if not size:
        raise ResourceError(
            f"students.{name}: not even one example fits into the memory of {device} with what is "
            "learnt from it; set gradient_checkpointing, train a smaller model or fewer terms, or "
            "lower the teacher's tokens.max_length"
        )
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_json(record, {KEY: size})
        logger.info("%s: micro-batches of %d (of %d): what fits", name, size, batch_size)
    return size


def _recorded(record: Path, batch_size: int) -> int:
    """Return the number that a run has kept; 0 if there is none, or the file is altered."""
    try:
        content = read_json(record)
    except IntegrityError:
        return 0
    size = content.get(KEY) if isinstance(content, dict) else None
    return size if isinstance(size, int) and 0 < size <= batch_size else 0


def _smallest(value: int, device: torch.device) -> int:
    """Return the smallest value of all ranks."""
    if not torch.distributed.is_initialized():
        return value
    smallest = torch.tensor(value, device=device)
    torch.distributed.all_reduce(smallest, op=torch.distributed.ReduceOp.MIN)
    return int(smallest)


class Rehearsal:
    """Runs a training's most expensive batch without changing the student or the random state.

    A CPU does not refuse memory that it lacks, so every batch fits there.

    Args:
        distiller: The student, on the device it trains on.
        dataset: Its examples.
        device: Where it trains.
        precision: The precision of `TrainOptions`.
        is_apart: Whether some steps compute the gradient of each term.
        held_bytes: The bytes that the optimiser will hold, see `held_bytes`.
        waiting: Micro-batches that wait on the device while one is used, see `most_waiting`.
    """

    def __init__(
        self,
        distiller: Distiller,
        dataset: StoreDataset,
        device: torch.device,
        *,
        precision: str,
        is_apart: bool,
        held_bytes: int,
        waiting: int,
    ) -> None:
        self._distiller = distiller
        self._dataset = dataset
        self._device = device
        self._dtype = getattr(torch, precision) if precision in HALF else None
        self._is_apart = is_apart
        self._held_bytes = held_bytes
        self._waiting = waiting
        self._trained = [p for p in distiller.parameters() if p.requires_grad]

    def fits(self, size: int) -> bool:
        """Tell whether this number of examples will run at once."""
        before = RandomState.now()
        try:
            self._run(size)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            is_enough = False
        else:
            is_enough = True
        # After the error is gone, whose frames hold the batch.
        for parameter in self._trained:
            parameter.grad = None
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        before.restore()
        return is_enough

    def _run(self, size: int) -> None:
        held = torch.empty(
            self._held_bytes + self._reserve(), dtype=torch.uint8, device=self._device
        )
        for parameter in self._trained:
            # Those of the micro-batches before.
            parameter.grad = torch.zeros_like(parameter)
        fed = self._worst(size)
        beside = sum(one.nbytes for one in tensors_of(fed.pieces[0])) * self._waiting
        waiting = torch.empty(beside, dtype=torch.uint8, device=self._device)
        self._distiller.train()
        with torch.autocast(self._device.type, dtype=self._dtype, enabled=self._dtype is not None):
            losses = self._distiller(fed.pieces[0], fed.counts, apart=self._is_apart)
        kept = [self._gradient(value) for value in losses.terms.values() if self._is_apart]
        losses.total.backward()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        del held, kept, waiting

    def _worst(self, size: int) -> Fed:
        count = partial(term_counts, objective=self._distiller.objective, task=self._distiller.task)
        longest = int(self._dataset.length.argmax())
        feed = Feed(self._dataset, self._device, count)
        try:
            return feed.take(iter([[longest] * size]), 1)[0]
        finally:
            feed.close()

    def _gradient(self, term: torch.Tensor) -> torch.Tensor:
        parameters = [p for p in self._distiller.student.parameters() if p.requires_grad]
        found = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
        return torch.cat([gradient.flatten() for gradient in found])

    def _reserve(self) -> int:
        if self._device.type != "cuda":
            return 0
        return int(RESERVE * torch.cuda.get_device_properties(self._device).total_memory)
