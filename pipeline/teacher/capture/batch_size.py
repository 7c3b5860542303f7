"""The maximum tokens of a batch: tested before the first segment, then fixed for the store.

The composition of a batch changes the last bits of its features, and a segment must come out the
same in every capture. So the largest batches run once with everything that is captured from them.
A number that does not fit into memory is refused before anything is written, or halved if it is
`auto`. The resulting number is recorded in the store's plan and every later capture uses it. The
store's fingerprint holds the word `auto` instead of the number, because a project's store must be
known from its parameters alone, on a machine without the device.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.axes import SPLITS, TRAIN
from pipeline.errors import IntegrityError, ResourceError, in_short, is_out_of_memory
from pipeline.store.forms.form import Channels
from pipeline.store.layout import Layout
from pipeline.store.plan import Ints, Plan, bucketed_batches
from pipeline.store.planner import Rows
from pipeline.store.schema import check_plan
from pipeline.store.sealed import read_record
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport
from pipeline.taps.inputs import model_columns, model_inputs, run_base
from pipeline.teacher.capture.declare import geometry_of
from pipeline.teacher.capture.encode import BatchEncoder
from pipeline.teacher.capture.forward import Batch, collate
from pipeline.teacher.capture.request import splits_of
from pipeline.teacher.capture.token_rows import planned_segment

logger = logging.getLogger(__name__)
LARGEST = {"cuda": 65_536}
LARGEST_ELSEWHERE = 8_192
"""Padded tokens that `auto` starts with; a CPU is not faster with more."""


def largest_batch_tokens(device: torch.device) -> int:
    """Return the padded tokens that `auto` starts with on a device."""
    return LARGEST.get(device.type, LARGEST_ELSEWHERE)


def known_batch_tokens(layout: Layout, parameter: int | Literal["auto"]) -> int | None:
    """Return a store's number from its parameter or its plan; None if it must be determined.

    For a plan that is lost or altered, `auto` is determined again.
    """
    if parameter != "auto":
        return parameter
    try:
        plan = read_record(layout.plan, layout.root)
        check_plan(plan, layout.plan)
    except IntegrityError:
        return None
    return plan.get("batch_tokens")


def settle_batch_tokens(
    known: int | None,
    fits: Callable[[int], bool],
    *,
    is_stored: bool,
    nearby: int | None,
    device: torch.device,
    longest: int,
) -> int:
    """Return the known number if it fits, else the first that fits when halving a large one.

    Args:
        known: The number from parameters or an earlier capture; None to determine it.
        fits: Tells whether batches of that many padded tokens fit into memory.
        is_stored: Whether the store has values that were computed in such batches.
        nearby: The number of another store, whose segments can be reused only with the same number.
        device: The device they run on.
        longest: Tokens of the longest example, the minimum of a batch.

    Raises:
        ResourceError: If the known number, or the longest example by itself, does not fit.
    """
    if known is not None:
        if fits(known):
            return known
        raise ResourceError(
            f"capture.batch_tokens: batches of up to {known} tokens, padding included, do not fit "
            f"into the memory of {device} with all that is captured; {_remedy(is_stored)}"
        )
    size = nearby or largest_batch_tokens(device)
    while not fits(size):
        if size <= longest:
            raise ResourceError(
                f"capture.batch_tokens: auto found no size that fits into the memory of {device}, "
                f"not even one example of {longest} tokens; lower tokens.max_length, capture fewer "
                "layers, or set device_map: auto in runtime.yaml: nothing was written"
            )
        logger.info("batches of up to %d tokens do not fit into memory, trying half", size)
        size //= 2
    logger.info("batches of up to %d tokens fit into memory and are fixed for this store", size)
    return size


def _remedy(is_stored: bool) -> str:
    if is_stored:
        return (
            "they are fixed for this store: use a device with more memory, capture the added "
            "signals in several captures, or change capture.batch_tokens, which starts a new store"
        )
    return "lower it, set it to auto, or capture fewer layers: nothing was written"


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """Runs a plan's largest batches exactly as its segments will run, to see if they fit.

    If several processes share a device, each needs that memory.

    Args:
        model: The teacher.
        report: The report of its tap check.
        signals: The signals to capture.
        plan: The store's segment plan.
        rows: Its rows.
        pad_id: The padding id.
        device: The device of the teacher's inputs.
    """

    model: PreTrainedModel
    report: TapReport
    signals: Sequence[Signal]
    plan: Plan
    rows: Rows
    pad_id: int
    device: torch.device

    def fits(self, batch_tokens: int) -> bool:
        """Tell whether all batches of at most that many padded tokens fit into memory."""
        try:
            for split, batches in worst_batches(self.plan, batch_tokens).items():
                self._run(split, batches)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            does_fit = False
        else:
            does_fit = True
        # Only now is the error gone, whose frames hold the batch.
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return does_fit

    def _run(self, split: str, batches: Sequence[tuple[int, Ints]]) -> None:
        signals = [signal for signal in self.signals if split in splits_of(signal)]
        # With blocks but no signals, the teacher runs on training rows to measure matrix inputs.
        if not signals and (self.signals or split != TRAIN):
            return
        encode = BatchEncoder(self.model, self.report, signals, self._channels(signals))
        for number, members in batches:
            segment = planned_segment(self.plan, self.rows, number)
            batch = collate(segment, members, self.pad_id, self.device)
            if not signals:
                self._run_plainly(batch)
                continue
            # On a GPU a batch is still being copied to the host when the next one runs.
            before = encode(batch) if self.device.type == "cuda" else None
            encode(batch)
            del before

    def _channels(self, signals: Sequence[Signal]) -> dict[str, Channels | None]:
        """Return placeholders for channel statistics, which are measured later."""
        channels: dict[str, Channels | None] = {}
        for signal in signals:
            if signal.form.needs_channels:
                width = geometry_of(signal, self.model, self.report).width
                channels[signal.name] = Channels(torch.zeros(width), torch.ones(width))
        return channels

    @torch.inference_mode()
    def _run_plainly(self, batch: Batch) -> None:
        columns = model_columns(self.model, batch.inputs)
        run_base(self.model, model_inputs(columns, is_causal=self.report.causal))


def worst_batches(plan: Plan, batch_tokens: int) -> dict[str, list[tuple[int, Ints]]]:
    """Return, by split, the batches that need most memory: segment, and members of its examples.

    Memory of a pass grows with padded tokens, and with their pairs if attention maps are computed;
    memory of its features grows with live tokens. The maximum of each is returned. Other splits
    than training are left out if their batches are not larger.
    """
    batches: dict[str, list[tuple[int, Ints]]] = {}
    largest = np.zeros(3, np.int64)
    for split in sorted(SPLITS, key=lambda name: name != TRAIN):
        worst: dict[int, tuple[int, int, Ints]] = {}
        for number in plan.segments_of(split):
            lengths = plan.length[plan.in_segment(number)]
            for members in bucketed_batches(lengths, batch_tokens):
                longest = int(lengths[members].max())
                padded = longest * len(members)
                needs = (padded, padded * longest, int(lengths[members].sum()))
                for kind, need in enumerate(needs):
                    if need > worst.get(kind, (0,))[0]:
                        worst[kind] = need, number, members
        sizes = np.array([worst[kind][0] for kind in sorted(worst)] or [0, 0, 0])
        if (sizes > largest).any():
            unique = {
                (number, members.tobytes()): (number, members)
                for _, number, members in worst.values()
            }
            batches[split] = list(unique.values())
            largest = np.maximum(largest, sizes)
    return batches


def named_check_memory() -> AbstractContextManager[None]:
    """Name an allocation that fails in the check of the taps, and what may help.

    Raises:
        ResourceError: Instead of the out-of-memory error.
    """
    return _named(
        "in the check of the teacher's taps, which runs its longest example with its logits, and "
        "with eager attention where attention is captured; lower tokens.max_length, leave "
        "attention out, or set device_map: auto in runtime.yaml: nothing was written"
    )


def named_memory(batch_tokens: int) -> AbstractContextManager[None]:
    """Name an allocation that fails while segments run, and what may help.

    Raises:
        ResourceError: Instead of the out-of-memory error.
    """
    return _named(
        f"in a batch of the store's {batch_tokens} tokens, which did fit before the first segment; "
        "run the same command again with fewer workers or fewer other programs: finished segments "
        "are kept"
    )


@contextmanager
def _named(rest: str) -> Iterator[None]:
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(f"out of memory ({in_short(error)}) {rest}") from error
