"""Run the teacher again on a few batches and compare with what the store decodes.

The batches are those of the capture, so on the same hardware values differ only by the error of
their form. On other hardware the teacher itself rounds differently, within the tap check's bound.
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
from pipeline.teacher.capture.batch_size import named_check_memory
from pipeline.teacher.capture.forward import (
    Batch,
    TappedTeacher,
    collate,
    feature_key,
    segment_batches,
)
from pipeline.teacher.capture.spec import planned_batch_tokens
from pipeline.teacher.capture.tap_check import checked_examples, taps_of
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.source.placement import Placement, input_device
from pipeline.teacher.source.reference import TeacherReference

SEGMENTS = 2
"""Number of training segments to take batches from: the first and the last."""


@dataclass(frozen=True)
class SpotCheck:
    """Result of the comparison for one signal.

    `share` is the largest error divided by the allowed error, which is the error that the form
    states plus the tolerance of taps. Above 1 the store does not hold the teacher's values.
    `segment` is where the largest error occurs.
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
    """Run the teacher on a sample of rows and compare each signal with the form's stated error.

    Args:
        reader: The store.
        directory: The teacher's directory, with its `teacher.json`.
        names: Signals to compare; those without arrays are left out.
        device: The teacher's device.
        placement: How it is spread over devices.

    Raises:
        ConfigError: If the teacher cannot be found.
        IncompatibleError: If it is not the store's teacher, or cannot be tapped.
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
    declared = {name: signal for name, signal in declared.items() if signal.arrays()}
    signals = list(declared.values())
    with named_check_memory():
        report = check_taps(
            model,
            _check_batch(model, reader, device),
            taps_of(signals),
            max_length=reader.plan["max_length"],
        )
    teacher = TappedTeacher(model, report, signals)
    worst: dict[str, SpotCheck] = {}
    sample = _sample(reader, declared)
    for number in tqdm(sample, desc="spot check", unit="segment", leave=False):
        present = [name for name in declared if number in reader.signal(name).receipts]
        segment = reader.read_segment(number)
        stored = reader.read_segment(number, present)
        batches = list(
            segment_batches(
                segment, planned_batch_tokens(reader.plan), reader.plan["pad_id"], device
            )
        )
        # Batches are ordered by length, so the first and the last are the extremes.
        for batch in {id(b): b for b in (batches[0], batches[-1])}.values():
            shares = dict.fromkeys(present, 0.0)
            for feature, values in teacher.values(batch):
                names_here = [n for n in present if feature_key(declared[n]) == feature]
                rows = {
                    name: _rows(
                        *(reader, declared[name], segment, batch),
                        reader.signal(name).receipts[number].skipped,
                    )
                    for name in names_here
                }
                first = 0
                for piece in teacher.pieces(feature, values):
                    for name in names_here:
                        share = _share(
                            declared[name],
                            piece,
                            stored.features[name],
                            _within(rows[name], first, len(next(iter(piece.values())))),
                            reader.channels(name),
                            bound_of(model),
                        )
                        shares[name] = max(shares[name], share)
                    first += len(next(iter(piece.values())))
            for name, share in shares.items():
                before = worst.get(name, SpotCheck(name, 0, 0.0, number))
                examples = before.examples + len(batch.members)
                largest, segment_of_it = max((before.share, before.segment), (share, number))
                worst[name] = SpotCheck(name, examples, largest, segment_of_it)
    return list(worst.values())


def _check_batch(model: Any, reader: StoreReader, device: torch.device) -> dict[str, Tensor]:
    """Return the longest training examples and a short one, as capture uses for its tap check."""
    table = reader.examples
    is_train = table["split"] == SPLITS.index(TRAIN)
    longest = int(np.where(is_train, table["length"], 0).argmax())
    segment = reader.read_segment(int(table["segment"][longest]))
    members = np.argsort(-segment.length, kind="stable")[
        : checked_examples(model, int(segment.length.max()))
    ]
    members[-1] = np.argmin(segment.length)
    batch = collate(segment, np.unique(members), reader.plan["pad_id"], device)
    return batch.inputs


def _sample(reader: StoreReader, declared: Mapping[str, Declaration]) -> list[int]:
    """Return segments of every split that has a captured signal."""
    splits = {split for signal in declared.values() for split in signal.splits}
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
    """Return the indices, in the segment and in the batch, of the rows of usable examples."""
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
    """Return the rows that are in one piece of the batch, with batch indices relative to it."""
    in_segment, in_batch = rows
    is_inside = (in_batch >= first) & (in_batch < first + count)
    return in_segment[is_inside], in_batch[is_inside] - first


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
    """Return the largest error of some rows divided by the allowed error."""
    in_segment, in_batch = rows
    if not len(in_segment):
        return 0.0
    form = declared.form
    device = next(iter(values.values())).device
    moved = _on(channels, device)
    true = {key: value[torch.from_numpy(in_batch).to(device)] for key, value in values.items()}
    stored = {
        key: torch.from_numpy(np.ascontiguousarray(value[in_segment])).to(device)
        for key, value in arrays.items()
    }
    decoded = form.decode(stored, moved)
    worst = 0.0
    for name, error in form.errors(true, decoded, moved).items():
        # The teacher's rounding error scales with a channel's size; for log-probabilities with 1.
        size = torch.as_tensor(true.get(name, error.found)).abs().amax(0, keepdim=True)
        allowed = error.stated + bound * size.clamp(min=1.0)
        # `max` would ignore a NaN.
        share = torch.nan_to_num(error.found / allowed, nan=math.inf, posinf=math.inf)
        worst = max(worst, float(share.max()))
    return worst
