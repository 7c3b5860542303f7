"""The teacher runs again on a few batches: is what the store decodes what the teacher says?

Batches are those of the capture, so on the same hardware values differ by nothing but their form;
on other hardware the teacher itself rounds otherwise, by what its taps are allowed as well.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pipeline.axes import SPLITS, TRAIN
from pipeline.errors import IncompatibleError
from pipeline.store.extent import example_rows, first_rows
from pipeline.store.forms.form import Channels
from pipeline.store.reader import Segment, StoreReader
from pipeline.store.records import Declaration
from pipeline.taps.check import check_taps
from pipeline.taps.comparison import bound_of
from pipeline.teacher.capture.forward import (
    Batch,
    TappedTeacher,
    collate,
    place_of,
    segment_batches,
)
from pipeline.teacher.capture.spec import planned_batch_tokens
from pipeline.teacher.capture.tap_check import taps_of
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.source.placement import Placement, input_device
from pipeline.teacher.source.reference import TeacherReference

CHECK_EXAMPLES = 4
SEGMENTS = 2
"""Segments of the training split that batches are taken of, the first and the last."""


@dataclass(frozen=True)
class SpotCheck:
    """What a sample of a signal says.

    `share` is the largest error as a part of the one allowed: what the form states, and how far
    the taps of two runs may be apart. Above 1 the store does not hold what the teacher says.
    """

    signal: str
    examples: int
    share: float
    segment: int

    @property
    def is_within(self) -> bool:
        """Whether every value is within its allowed error."""
        return self.share <= 1


def spot_check(
    reader: StoreReader,
    directory: Path,
    names: Sequence[str],
    *,
    device: torch.device,
    placement: Placement | None = None,
) -> list[SpotCheck]:
    """Run the teacher on a sample of the store's rows and compare each signal with its form's word.

    Args:
        reader: The store.
        directory: The teacher's directory, with its `teacher.json`.
        names: Signals to compare; those without arrays say nothing.
        device: Where the teacher runs.
        placement: How it is spread over devices.

    Raises:
        ConfigError: If the teacher cannot be found.
        IncompatibleError: If it is another one than the store's, or cannot be tapped.
        IntegrityError: If the store is damaged.
    """
    spec, reference = reader.plan["spec"], TeacherReference.load(directory)
    expected = spec["teacher"]
    if reference.identity() != expected:
        raise IncompatibleError(
            f"{directory}: weights {reference.weights_sha256[:16]}, the store is of "
            f"{expected['weights_sha256'][:16]}; give the teacher's directory with --teacher"
        )
    model = load_teacher(
        directory,
        reference,
        task=reader.plan["task"],
        device=device,
        dtype=getattr(torch, spec["segments"]["dtype"]),
        placement=placement,
    )
    device = input_device(model, device)
    declared = {name: reader.signal(name).declaration for name in names}
    declared = {name: one for name, one in declared.items() if one.arrays()}
    signals = list(declared.values())
    report = check_taps(
        model,
        _check_batch(model, reader, device),
        taps_of(signals),
        max_length=reader.plan["max_length"],
    )
    teacher = TappedTeacher(model, report, signals)
    worst: dict[str, SpotCheck] = {}
    sample = _sample(reader, declared)
    for number in tqdm(sample, desc="asking the teacher", unit="segment", leave=False):
        here = [name for name in declared if number in reader.signal(name).receipts]
        segment = reader.read_segment(number)
        stored = reader.read_segment(number, here)
        batches = list(
            segment_batches(
                segment, planned_batch_tokens(reader.plan), reader.plan["pad_id"], device
            )
        )
        # Longest examples first: the first batch and the last one are the extremes.
        for batch in {id(b): b for b in (batches[0], batches[-1])}.values():
            found = dict.fromkeys(here, 0.0)
            for place, values in teacher.values(batch):
                at = [n for n in here if place_of(declared[n]) == place]
                rows = {
                    name: _rows(
                        *(reader, declared[name], segment, batch),
                        reader.signal(name).receipts[number].skipped,
                    )
                    for name in at
                }
                first = 0
                for piece in teacher.pieces(place, values):
                    for name in at:
                        share = _share(
                            declared[name],
                            piece,
                            stored.features[name],
                            _within(rows[name], first, len(next(iter(piece.values())))),
                            reader.channels(name),
                            bound_of(model),
                        )
                        found[name] = max(found[name], share)
                    first += len(next(iter(piece.values())))
            for name, share in found.items():
                before = worst.get(name, SpotCheck(name, 0, 0.0, number))
                examples = before.examples + len(batch.members)
                largest, where = max((before.share, before.segment), (share, number))
                worst[name] = SpotCheck(name, examples, largest, where)
    return list(worst.values())


def _check_batch(model: Any, reader: StoreReader, device: torch.device) -> dict[str, Tensor]:
    """The longest training examples and a short one, as capture checks its taps on."""
    table = reader.examples
    is_train = table["split"] == SPLITS.index(TRAIN)
    longest = int(np.where(is_train, table["length"], 0).argmax())
    segment = reader.read_segment(int(table["segment"][longest]))
    members = np.argsort(-segment.length, kind="stable")[:CHECK_EXAMPLES]
    members[-1] = np.argmin(segment.length)
    batch = collate(segment, np.unique(members), reader.plan["pad_id"], device)
    return batch.inputs


def _sample(reader: StoreReader, declared: Mapping[str, Declaration]) -> list[int]:
    """Return segments of every split that some signal is captured for."""
    splits = {split for one in declared.values() for split in one.splits}
    train = reader.segments(TRAIN)
    chosen = {*train[:1], *train[1 - SEGMENTS :]}
    for split in splits - {TRAIN}:
        chosen.update(reader.segments(split)[:1])
    return sorted(chosen)


def _rows(
    reader: StoreReader,
    declared: Declaration,
    segment: Segment,
    batch: Batch,
    skipped: Sequence[int],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows, in the segment and in the batch's values, of a batch's usable examples."""
    counts = example_rows(declared.axis, segment.length, declared.rule)
    slots = segment.slot[batch.members]
    first, counts = first_rows(counts)[slots], counts[slots]
    owners = np.repeat(np.arange(len(slots)), counts)
    within = np.arange(len(owners)) - first_rows(counts)[owners]
    usable = ~np.isin(slots[owners], list(skipped))
    return (first[owners] + within)[usable], np.flatnonzero(usable)


def _within(
    rows: tuple[np.ndarray, np.ndarray], first: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return those of some rows that are in a piece of the batch, counted from its first."""
    in_segment, in_batch = rows
    here = (in_batch >= first) & (in_batch < first + count)
    return in_segment[here], in_batch[here] - first


def _on(channels: Channels | None, device: torch.device) -> Channels | None:
    if channels is None:
        return None
    mean, deviation = torch.from_numpy(channels.mean), torch.from_numpy(channels.deviation)
    return Channels(mean.to(device), deviation.to(device))


def _share(
    declared: Declaration,
    values: Mapping[str, Tensor],
    arrays: Mapping[str, np.ndarray],
    rows: tuple[np.ndarray, np.ndarray],
    channels: Channels | None,
    bound: float,
) -> float:
    """Return the largest error of some rows as a part of what is allowed."""
    in_segment, in_batch = rows
    if not len(in_segment):
        return 0.0
    form = declared.form
    device = next(iter(values.values())).device
    of = _on(channels, device)
    true = {key: value[torch.from_numpy(in_batch).to(device)] for key, value in values.items()}
    stored = {
        key: torch.from_numpy(np.ascontiguousarray(value[in_segment])).to(device)
        for key, value in arrays.items()
    }
    decoded = form.decode(stored, of)
    worst = 0.0
    for name, error in form.errors(true, decoded, of).items():
        # The teacher's own rounding goes with the size of a channel; of log-probabilities with 1.
        size = torch.as_tensor(true.get(name, error.found)).abs().amax(0, keepdim=True)
        allowed = error.stated + bound * size.clamp(min=1.0)
        # A comparison would lose a NaN.
        share = torch.nan_to_num(error.found / allowed, nan=math.inf, posinf=math.inf)
        worst = max(worst, float(share.max()))
    return worst
