"""How many tokens may run together, tried before the first segment and never changed after it.

Which examples run together decides the last bits of what they become, and a store's segments must
come out the same whoever captures them. So the worst batches that there will be run once, with all
that is asked of them: a number that does not fit is refused before anything is written, or halved
if it is `auto`. The number found stands in the store's plan, and every later capture takes it.
The store's fingerprint holds the word `auto` and not the number: which store a project has must be
told from its parameters alone, on a machine that has no such device.
"""

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.axes import SPLITS, TRAIN
from pipeline.errors import IntegrityError, ResourceError
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
from pipeline.training.memory import is_out_of_memory

logger = logging.getLogger(__name__)
LARGEST = {"cuda": 65_536}
LARGEST_ELSEWHERE = 8_192
"""Padded tokens that `auto` begins with; a CPU is no faster with more."""


def largest_batch_tokens(device: torch.device) -> int:
    """Return the padded tokens that `auto` begins with on a device."""
    return LARGEST.get(device.type, LARGEST_ELSEWHERE)


def known_batch_tokens(layout: Layout, asked: int | Literal["auto"]) -> int | None:
    """Return the number of a store: what its parameters say, or its plan; None if it has none yet.

    A plan that is lost or altered is written again, and `auto` is tried again for it.
    """
    if asked != "auto":
        return asked
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
    """Return the number that is known, or the first that fits of a largest one and its halves.

    Args:
        known: What parameters or an earlier capture say; None to look for it.
        fits: Tells whether batches of so many padded tokens run.
        is_stored: Whether the store has values that were computed in such batches.
        nearby: What a store beside has, whose segments can be taken if this one has the same.
        device: Where they run.
        longest: Tokens of the longest example, which are always one batch at least.

    Raises:
        ResourceError: If the number that is known, or the longest example alone, does not fit.
    """
    if known is not None:
        if fits(known):
            return known
        raise ResourceError(
            f"capture.batch_tokens: batches of up to {known} tokens, padding included, do not fit "
            f"into the memory of {device} with what is captured of them; {_remedy(is_stored)}"
        )
    size = nearby or largest_batch_tokens(device)
    while not fits(size):
        if size <= longest:
            raise ResourceError(
                f"capture.batch_tokens: auto found none that fits into the memory of {device}, not "
                f"even one example of {longest} tokens; lower tokens.max_length, capture fewer "
                "layers, or give device_map: auto in runtime.yaml: nothing was written"
            )
        logger.info("batches of up to %d tokens do not fit into memory, trying half of it", size)
        size //= 2
    logger.info("batches of up to %d tokens fit into memory; the store keeps to them", size)
    return size


def _remedy(is_stored: bool) -> str:
    if is_stored:
        return (
            "the store keeps to them: capture what was added on a device with more memory or in "
            "several captures, or change capture.batch_tokens, which begins another store"
        )
    return "lower it, set it to auto, or capture fewer layers: nothing was written"


class Rehearsal:
    """Runs the worst batches of a plan as its segments will run them.

    Of a device that several processes share it says what one of them may take.

    Args:
        model: The teacher.
        report: What the check of its taps found.
        signals: What is to be captured.
        plan: The store's plan.
        rows: Its rows.
        pad_id: The padding id.
        device: Where the teacher takes its inputs.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        report: TapReport,
        signals: Sequence[Signal],
        plan: Plan,
        rows: Rows,
        pad_id: int,
        device: torch.device,
    ) -> None:
        self._model = model
        self._report = report
        self._signals = signals
        self._plan = plan
        self._rows = rows
        self._pad_id = pad_id
        self._device = device

    def fits(self, batch_tokens: int) -> bool:
        """Tell whether every batch of at most so many padded tokens will run."""
        try:
            for split, found in worst_batches(self._plan, batch_tokens).items():
                self._run(split, found)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            is_enough = False
        else:
            is_enough = True
        # After the error is gone, whose frames hold the batch.
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        return is_enough

    def _run(self, split: str, batches: Sequence[tuple[int, Ints]]) -> None:
        wanted = [signal for signal in self._signals if split in splits_of(signal)]
        # For blocks alone the teacher runs on training rows, to see what its matrices read.
        if not wanted and (self._signals or split != TRAIN):
            return
        encode = BatchEncoder(self._model, self._report, wanted, self._channels(wanted))
        for number, members in batches:
            segment = planned_segment(self._plan, self._rows, number)
            batch = collate(segment, members, self._pad_id, self._device)
            if not wanted:
                self._run_plainly(batch)
                continue
            # On a GPU a batch is still on its way to the host when the next one runs.
            before = encode(batch) if self._device.type == "cuda" else None
            encode(batch)
            del before

    def _channels(self, signals: Sequence[Signal]) -> dict[str, Channels | None]:
        """Stand in for statistics that are measured later, on batches of this size."""
        found: dict[str, Channels | None] = {}
        for signal in signals:
            if signal.form.needs_channels:
                width = geometry_of(signal, self._model, self._report).width
                found[signal.name] = Channels(torch.zeros(width), torch.ones(width))
        return found

    @torch.inference_mode()
    def _run_plainly(self, batch: Batch) -> None:
        columns = model_columns(self._model, batch.inputs)
        run_base(self._model, model_inputs(columns, is_causal=self._report.causal))


def worst_batches(plan: Plan, batch_tokens: int) -> dict[str, list[tuple[int, Ints]]]:
    """Return, by split, the batches that need most: segment, and members among its examples.

    What a pass needs grows with padded tokens, with pairs of them where a map is made, and what is
    kept of it with live tokens. Splits but the first are left out where it has batches of no less.
    """
    found: dict[str, list[tuple[int, Ints]]] = {}
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
            found[split] = list(unique.values())
            largest = np.maximum(largest, sizes)
    return found


@contextmanager
def named_memory(batch_tokens: int) -> Iterator[None]:
    """Say of an allocation that fails once segments run what may help; batches stay as they are.

    Raises:
        ResourceError: Instead of it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(
            f"out of memory ({' '.join(str(error).split())[:200]}) in a batch of the store's "
            f"{batch_tokens} tokens, which ran before the first segment; run the same command "
            "again with fewer workers or nothing beside it: what is finished is kept"
        ) from error
