"""Estimates of the bytes that a store takes on disk, before anything is captured.

The plan gives the number of stored rows and the form gives the bytes of each, so the size before
compression is exact, and an upper bound follows from it. The expected size uses a ratio of
compression: the form's own, measured on trained teachers, or that of a probe of this teacher.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from pipeline.axes import SPLITS, Axis
from pipeline.errors import IncompatibleError
from pipeline.store.codec import CRC, encode_shard, most_bytes
from pipeline.store.extent import Extent, example_rows, segment_extent
from pipeline.store.forms.form import ArrayType, Tap
from pipeline.store.layout import BLOCKS
from pipeline.store.plan import Plan
from pipeline.store.planner import EXAMPLE_DTYPES, ROW_DIGEST_BYTES, TOKEN_DTYPES
from pipeline.store.signals import Signal
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.below import query_key_parameters
from pipeline.taps.check import TapReport
from pipeline.taps.head import linear_head
from pipeline.teacher.capture.declare import geometry_of, row_bytes
from pipeline.teacher.capture.request import splits_of

RECORD_BYTES = 900
"""A receipt of one segment and signal, and its line in the signal's manifest."""


@dataclass(frozen=True)
class SignalEstimate:
    """The bytes that one signal takes in a store.

    `raw_bytes` is the size of its rows before compression, `most_bytes` an upper bound on its files
    and `expected_bytes` their size by `ratio`. `tokens` counts the tokens of the signal's splits.
    """

    signal: Signal
    splits: tuple[str, ...]
    tokens: int
    rows: int
    row_bytes: int
    raw_bytes: int
    most_bytes: int
    expected_bytes: int
    ratio: float
    is_measured: bool

    @property
    def token_bytes(self) -> float:
        """Expected bytes for each token that has the signal."""
        return self.expected_bytes / max(1, self.tokens)


class SegmentRows:
    """The number of rows in each segment of a plan, counted once for each axis and rule."""

    def __init__(self, plan: Plan, chunk_tokens: int) -> None:
        self.plan = plan
        self._record = {
            "segment_tokens": plan.segment_tokens,
            "chunk_tokens": chunk_tokens,
            "examples_per_segment": plan.examples_per_segment,
        }
        self._tokens = self._sum(plan.length.astype(np.int64))
        self._found: dict[tuple[Axis, str], tuple[NDArray[np.int64], Extent]] = {}

    def _sum(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        found = np.zeros(self.plan.segments, np.int64)
        np.add.at(found, self.plan.segment, rows)
        return found

    def rows(self, axis: Axis, rule: str) -> tuple[NDArray[np.int64], Extent]:
        """Return the number of rows in every segment, and the capacity of a segment."""
        if (axis, rule) not in self._found:
            plan = self.plan
            extent = segment_extent(
                axis, self._record, length=plan.length, segment=plan.segment, rule=rule
            )
            self._found[axis, rule] = self._sum(example_rows(axis, plan.length, rule)), extent
        return self._found[axis, rule]

    def segments_of(self, splits: Sequence[str]) -> NDArray[np.int64]:
        """Return the segments of some splits."""
        return np.flatnonzero(np.isin(self.plan.segment_split, [SPLITS.index(s) for s in splits]))

    def tokens_of(self, splits: Sequence[str]) -> int:
        """Return the tokens of some splits."""
        return int(self._tokens[self.segments_of(splits)].sum())


def estimate_signal(
    signal: Signal,
    segments: SegmentRows,
    *,
    model: PreTrainedModel,
    report: TapReport,
    ratio: float | None = None,
) -> SignalEstimate:
    """Return the bytes that one signal takes.

    Args:
        signal: What is captured.
        segments: The rows of the plan.
        model: The teacher, or its outline.
        report: The teacher's sizes, from the check of its taps or from an outline.
        ratio: Bytes on disk over bytes before compression where a probe measured them; None takes
            the form's own.

    Raises:
        IncompatibleError: If the form's options do not fit the teacher's sizes.
    """
    form, geometry = signal.form, geometry_of(signal, model, report)
    rule = "causal" if signal.layer is None else report.rule.get(signal.layer, "causal")
    splits = splits_of(signal)
    every, extent = segments.rows(form.axis, rule)
    rows = every[segments.segments_of(splits)]
    size = row_bytes(signal, geometry)
    raw = int(rows.sum()) * size
    found = form.ratio if ratio is None else ratio
    bounds = [
        _array_bytes(array, rows, extent.shard_rows, extent.chunk_rows)
        for array in form.arrays(geometry).values()
    ]
    most = sum(bound for bound, _ in bounds)
    fixed = sum(empty for _, empty in bounds)
    return SignalEstimate(
        signal=signal,
        splits=splits,
        tokens=segments.tokens_of(splits),
        rows=int(rows.sum()),
        row_bytes=size,
        raw_bytes=raw,
        most_bytes=most,
        expected_bytes=min(most, round(raw * found) + fixed),
        ratio=found,
        is_measured=ratio is not None,
    )


def _array_bytes(
    array: ArrayType, rows: NDArray[np.int64], shard_rows: int, chunk_rows: int
) -> tuple[int, int]:
    """Return an upper bound on an array's files, and the part of it that is empty chunks."""
    filled = int((-(-rows // chunk_rows)).sum())
    empty = len(rows) * (shard_rows // chunk_rows) - filled
    fixed = empty * _empty_chunk(array, chunk_rows) + len(rows) * CRC.size
    chunk = chunk_rows * int(np.prod(array.row_shape)) * np.dtype(array.dtype).itemsize
    return filled * (most_bytes(chunk, 1) - CRC.size) + fixed, fixed


@cache
def _empty_chunk(array: ArrayType, chunk_rows: int) -> int:
    """Return the bytes of a chunk of zeros with its entry in the shard's index."""
    zeros = np.zeros((chunk_rows, *array.row_shape), array.dtype)
    return len(encode_shard(zeros, chunk_rows)) - CRC.size


def asset_bytes(
    signals: Sequence[Signal],
    blocks: Sequence[int],
    model: PreTrainedModel,
    report: TapReport,
    *,
    item_bytes: int = 4,
) -> dict[str, int]:
    """Return the bytes of each asset, which is stored once, by name.

    Args:
        signals: What is captured.
        blocks: Blocks kept for students to start from.
        model: The teacher, or its outline.
        report: The teacher's sizes.
        item_bytes: Bytes of a number in its checkpoint. Head and blocks are stored no wider.
    """
    found: dict[str, int] = {}
    for signal in signals:
        for name in signal.assets:
            if signal.layer is None:
                head = linear_head(model).parameters()
                found[name] = sum(_bytes(parameter, item_bytes) for parameter in head)
            else:
                found[name] = _query_key_bytes(model, signal.layer)
    if blocks:
        found[BLOCKS] = _blocks_bytes(model, blocks, item_bytes)
    layers = {(s.kind, s.layer) for s in signals if s.form.has_channels}
    if layers:
        found["channels"] = len(layers) * 2 * 4 * report.d_teacher
    return found


def _bytes(tensor: torch.Tensor, item_bytes: int = 8) -> int:
    return tensor.numel() * min(tensor.element_size(), item_bytes)


def _query_key_bytes(model: PreTrainedModel, layer: int) -> int:
    """Return the bytes of a block up to its attention; of all of it if its parts are unknown."""
    try:
        with torch.device("meta"):
            found = query_key_parameters(model, layer)
    except (RuntimeError, IncompatibleError):
        found = dict(find_anatomy(model).blocks[layer - 1].named_parameters())
    return sum(map(_bytes, found.values()))


def _blocks_bytes(model: PreTrainedModel, blocks: Sequence[int], item_bytes: int) -> int:
    """Return the bytes that `write_blocks` writes: tied weights once per name, and magnitudes."""
    anatomy = find_anatomy(model)
    total = 0
    for name, value in model.state_dict().items():
        block = anatomy.block_of(name)
        if block is None or block in blocks:
            total += _bytes(value, item_bytes)
            if block is not None and value.ndim == 2:
                total += 4 * int(value.shape[1])
    return total


def table_bytes(plan: Plan, *, columns: int, signals: int) -> int:
    """Return about how many bytes tokens, example table and records take.

    Args:
        plan: The segment plan.
        columns: Token columns besides ids and loss mask.
        signals: How many signals have receipts.
    """
    tokens, examples = int(plan.length.sum()), len(plan.row)
    token = sum(np.dtype(TOKEN_DTYPES[name]).itemsize for name in ("input_ids", "loss_mask"))
    example = ROW_DIGEST_BYTES + sum(np.dtype(dtype).itemsize for dtype in EXAMPLE_DTYPES.values())
    # Ids of 32 bits compress to about half; the table is mostly counters, which compress, and
    # digests, which do not.
    return round(0.5 * (token + columns) * tokens + 0.6 * example * examples) + (
        RECORD_BYTES * plan.segments * signals
    )


def buffered_bytes(estimates: Sequence[SignalEstimate], plan: Plan) -> int:
    """Return the bytes in memory of the features of the fullest segment."""
    total = 0
    for one in estimates:
        per_segment = {
            Axis.TOKEN: plan.segment_tokens,
            Axis.EXAMPLE: plan.examples_per_segment,
            Axis.PAIR: -(-one.rows // max(1, plan.segments)) * 2,
        }[one.signal.form.axis]
        total += per_segment * one.row_bytes
    return total


def activation_bytes(
    model: PreTrainedModel,
    report: TapReport,
    signals: Sequence[Signal],
    *,
    batch_tokens: int,
    inner: int,
) -> int:
    """Return about how many bytes a batch takes while the teacher runs. This is not a bound.

    A block holds its input, a normed copy, query, key, value, output and two inner tensors of its
    feed-forward layer. Every tapped tensor is kept until it is encoded, in float32.

    Args:
        model: The teacher, or its outline.
        report: The teacher's sizes.
        signals: What is tapped.
        batch_tokens: Tokens of the largest batch, padding included.
        inner: Width of the feed-forward layers.
    """
    item = torch.empty(0, dtype=model.dtype).element_size()
    a_token = (6 * report.d_teacher + 3 * inner) * item
    for signal in signals:
        geometry = geometry_of(signal, model, report)
        if signal.kind == "attention":
            a_token += (geometry.heads + geometry.kv_heads) * geometry.d_head * item
        elif signal.form.tap is not Tap.LOGITS:
            a_token += (geometry.width + geometry.kv_heads * geometry.d_head) * item
    return batch_tokens * (a_token + 4 * report.d_teacher)
