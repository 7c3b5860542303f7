"""Batches of examples with their features, looked up in a store, in the stored dtypes.

Segments are read ahead in threads, in the order of a timetable. Values are widened on the device.
"""

from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.axes import TRAIN, Axis
from pipeline.errors import IntegrityError
from pipeline.store.extent import example_rows
from pipeline.store.reader import Segment, StoreReader
from pipeline.student.data.batch_order import Timetable, make_timetable
from pipeline.student.data.reads import SegmentReads

POOLS = 2
"""Pools of segments in memory, each as large as what is mixed at a time: one in use, one read."""


class StoreDataset(Dataset[dict[str, Any]]):
    """Looks up batches of examples of one split, with their features, in a store.

    A batch is right-padded. Token-axis features hold live tokens only, flat, in the order of the
    padded batch's live positions; example-axis features one row an example; pair-axis features the
    visible pairs of each example, in order of query, then key. `positions` are those of
    `positions_of`. `labels` are classes, or the targets
    of a regression or multi-label model. A batch is a copy: it keeps no segment in memory.

    The segments in use by the timetable are in memory, and so many read ahead that together they
    are twice those that are mixed at a time. Any example can be looked up at any time: the
    timetable only decides when segments are read. Only one thread at a time may use it.

    Attributes:
        pins_memory: Whether batches are in pinned memory, which a GPU copies from by itself.
    """

    def __init__(
        self,
        reader: StoreReader,
        signals: Sequence[str],
        *,
        split: str = TRAIN,
        pool_segments: int = 1,
        parts: int | None = None,
        reads: SegmentReads | None = None,
    ) -> None:
        """Open the examples of a split whose features are all there.

        Args:
            reader: The store.
            signals: Names of the signals that batches carry.
            split: The split of the examples.
            pool_segments: Segments in use at a time while no timetable is followed; as many are
                read ahead.
            parts: How many of the first parts of the training split; None for all.
            reads: Reads the segments, with these signals or more; several data sets may share it.
                None: the data set has its own.

        Raises:
            IncompatibleError: If the store has fewer parts.
            ValueError: If `reads` lacks a signal.
        """
        self.reader = reader
        self.pins_memory = False
        self._signals = list(signals)
        self._reads = reads or SegmentReads(reader, signals)
        if missing := set(signals) - set(self._reads.signals):
            raise ValueError(f"shared reads without {sorted(missing)}")
        self._held: dict[int, Future[Segment]] = {}
        table = reader.examples
        numbers = reader.segments(split, parts)
        is_chosen = np.isin(table["segment"], numbers)
        for name in signals:
            for segment, receipt in reader.signal(name).receipts.items():
                if receipt.skipped:
                    members = reader.examples_in(segment)
                    is_chosen[members[np.isin(table["slot"][members], receipt.skipped)]] = False
        self.examples = np.flatnonzero(is_chosen)
        self.segment = table["segment"][self.examples].astype(np.int64)
        self.length = table["length"][self.examples].astype(np.int64)
        self._label = table["label"][self.examples].astype(np.int64)
        self._targets = None if reader.targets is None else reader.targets[self.examples]
        declared = {name: reader.signal(name).declaration for name in signals}
        self._axis = {name: (signal.axis, signal.rule) for name, signal in declared.items()}
        self._rows = {
            (axis, rule): self._rows_on(axis, rule)
            for axis, rule in {(Axis.TOKEN, None), *self._axis.values()}
        }
        by_segment = np.concatenate([[0], np.flatnonzero(np.diff(self.segment)) + 1, [len(self)]])
        self.follow(
            make_timetable(
                self.segment,
                np.arange(len(self)),
                by_segment if len(self) else np.zeros(1, np.int64),
                together=pool_segments,
            )
        )

    def __len__(self) -> int:
        return len(self.examples)

    def follow(self, timetable: Timetable, then: Sequence[int] = ()) -> None:
        """Follow the timetable of the batches that will be looked up.

        Without one, examples are expected in the order of the store.

        Args:
            timetable: The timetable of an epoch.
            then: The segments that are needed first after the epoch.
        """
        self._timetable = timetable
        self._then = list(then)

    def release(self) -> None:
        """Drop the segments in memory; they are read again when needed."""
        self._held = {}

    def _rows_on(self, axis: Axis, rule: str | None) -> NDArray[np.int64]:
        """Return the first row of each example, and the one after its last, [2, examples].

        They count from the beginning of its segment's arrays, where examples follow each other on
        every axis.
        """
        table = self.reader.examples
        rows = example_rows(axis, table["length"], rule)
        last = np.cumsum(rows)
        first = last - rows
        begin = first[np.searchsorted(table["segment"], table["segment"])]
        return np.stack([first - begin, last - begin])[:, self.examples]

    def _enter(self, indices: Sequence[int]) -> list[Segment]:
        """Return the segment of each example; read others ahead and drop those that are done."""
        numbers = self.segment[indices].tolist()
        table = self._timetable
        now = int(table.batch[indices].min())
        begun = int(np.searchsorted(table.first, now, side="right"))
        in_use = table.segments[:begun][table.last[:begun] >= now].tolist()
        ahead = max(0, POOLS * table.together - len(in_use))
        near = [*table.segments[begun : begun + ahead].tolist(), *self._then][:ahead]
        wanted = dict.fromkeys([*numbers, *in_use, *near])
        self._held = {n: self._held.get(n) or self._reads.get(n) for n in wanted}
        try:
            segments = {number: self._held[number].result() for number in set(numbers)}
        except IntegrityError:
            # A signal that was withdrawn or rewritten is the better reason.
            self.reader.check_pins()
            raise
        return [segments[number] for number in numbers]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """Return the padded batch of these examples, in this order."""
        segments = self._enter(indices)
        lengths = self.length[indices]
        live = np.arange(lengths.max())[None, :] < lengths[:, None]
        batch: dict[str, Any] = {"attention_mask": self._copied(live.astype(np.int64))}
        for column in self.reader.plan["columns"]:
            dtype = torch.bool if column == "loss_mask" else torch.int64
            padded = self._empty(live.shape, dtype)
            values = padded.numpy()
            values.fill(self.reader.plan["pad_id"] if column == "input_ids" else 0)
            values[live] = np.concatenate(
                self._slices(
                    (Axis.TOKEN, None), indices, [segment.tokens[column] for segment in segments]
                )
            )
            batch[column] = padded
        mask = batch["loss_mask"].numpy() if "loss_mask" in batch else None
        batch["positions"] = {
            name: self._copied(indices) for name, indices in positions_of(live, mask).items()
        }
        if self._targets is not None:
            batch["labels"] = torch.from_numpy(self._targets[indices].astype(np.float32))
        elif (self._label[indices] >= 0).all():
            batch["labels"] = torch.from_numpy(self._label[indices])
        batch["features"] = {
            name: {
                array: self._gather(
                    name, indices, [segment.features[name][array] for segment in segments]
                )
                for array in segments[0].features[name]
            }
            for name in self._signals
        }
        return batch

    def _gather(self, name: str, indices: list[int], arrays: list[NDArray[Any]]) -> Tensor:
        slices = self._slices(self._axis[name], indices, arrays)
        dtype = torch.from_numpy(arrays[0][:0]).dtype
        rows = self._empty((sum(map(len, slices)), *arrays[0].shape[1:]), dtype)
        np.concatenate(slices, out=rows.numpy())
        return rows

    def _slices(
        self, axis: tuple[Axis, str | None], indices: list[int], arrays: list[NDArray[Any]]
    ) -> list[NDArray[Any]]:
        """Return each example's rows, as views of its segment's arrays."""
        first, last = self._rows[axis][:, indices].tolist()
        return [array[a:b] for array, a, b in zip(arrays, first, last, strict=True)]

    def _copied(self, values: NDArray[np.int64]) -> Tensor:
        copy = self._empty(values.shape, torch.int64)
        copy.numpy()[...] = values
        return copy

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=self.pins_memory)


def positions_of(
    live: NDArray[np.bool_], loss_mask: NDArray[np.bool_] | None
) -> dict[str, NDArray[np.int64]]:
    """Return where the tokens of a padded batch are, as indices.

    On a GPU, a mask would make the CPU wait until the GPU has counted it.

    Args:
        live: Mask of tokens, without padding, [batch, seq].
        loss_mask: Mask of the tokens that a language model is to predict; None for other models.

    Returns:
        `live`, `later` and `targets`, in the flattened batch: live tokens, those that are not the
        first of their row, and positions whose next token is to be predicted. `later_tokens` and
        `target_tokens` are the same positions counted among the live tokens alone.
    """
    number = live.flatten().cumsum() - 1
    later = live.copy()
    later[:, 0] = False
    positions = {"live": np.flatnonzero(live), "later": np.flatnonzero(later)}
    positions["later_tokens"] = number[positions["later"]]
    if loss_mask is not None:
        targets = np.zeros_like(live)
        targets[:, :-1] = loss_mask[:, 1:] & live[:, 1:]
        positions["targets"] = np.flatnonzero(targets)
        positions["target_tokens"] = number[positions["targets"]]
    return positions
