"""Batches of examples with their features, looked up in a store and gathered in stored dtypes.

Segments of the next pool are read ahead in a thread; values are widened on the device.
"""

from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from pipeline.axes import TRAIN
from pipeline.errors import IntegrityError
from pipeline.store.reader import Segment, StoreReader


class StoreDataset(Dataset[dict[str, Any]]):
    """Looks up batches of examples of one split, with their features, in a store.

    A batch is right-padded. Token-axis features hold live tokens only, flat, in the order of the
    padded batch's live positions; example-axis features one row an example; pair-axis features the
    visible pairs of each example, in order of query, then key. `labels` are classes, or the numbers
    that a regression or multi-label model is asked for.
    """

    def __init__(
        self,
        reader: StoreReader,
        signals: Sequence[str],
        *,
        split: str = TRAIN,
        pool_segments: int = 1,
        parts: int | None = None,
    ) -> None:
        """Open the examples of a split whose features are all there.

        Args:
            reader: The store.
            signals: Names of the signals that batches carry.
            split: Which examples.
            pool_segments: Segments in use at a time. Those of the pool before stay in memory for
                what was carried over, and half as many are read ahead.
            parts: So many of the first parts of the training split; None for all.

        Raises:
            IncompatibleError: If the store has fewer parts.
        """
        self.reader = reader
        self._signals = list(signals)
        table = reader.examples
        numbers = reader.segments(split, parts)
        chosen = np.isin(table["segment"], numbers)
        for name in signals:
            for segment, receipt in reader.signal(name).receipts.items():
                if receipt.skipped:
                    in_segment = table["segment"] == segment
                    chosen &= ~(in_segment & np.isin(table["slot"], receipt.skipped))
        self.examples = np.flatnonzero(chosen)
        self.segment = table["segment"][self.examples].astype(np.int64)
        self.length = table["length"][self.examples].astype(np.int64)
        self._label = table["label"][self.examples].astype(np.int64)
        self._targets = None if reader.targets is None else reader.targets[self.examples]
        self._pool_segments = pool_segments
        self._reads: dict[int, Future[Segment]] = {}
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="segment-reader")
        self.read_ahead(numbers)

    def __len__(self) -> int:
        return len(self.examples)

    def read_ahead(self, segments: Sequence[int]) -> None:
        """Say in which order segments will be wanted, pool by pool."""
        self._order = list(segments)
        self._position = {number: i for i, number in enumerate(self._order)}
        self._entered = -1

    def _enter(self, segments: Collection[int]) -> None:
        """Queue the pool a batch belongs to and half of the next; forget all but the one before.

        A batch may be all of examples carried over from the pool before; that is no step back.
        """
        latest = max(self._position.get(number, 0) for number in segments)
        start = latest // self._pool_segments * self._pool_segments
        if start <= self._entered:
            return
        self._entered = start
        end = start + self._pool_segments + max(1, self._pool_segments // 2)
        for number in self._order[start:end]:
            self._wanted(number)
        near = {*segments, *self._order[max(0, start - self._pool_segments) : end]}
        self._reads = {number: read for number, read in self._reads.items() if number in near}

    def _wanted(self, number: int) -> Future[Segment]:
        """Return a segment that is read, being read, or now queued to be read."""
        if number not in self._reads:
            self._reads[number] = self._reading.submit(
                self.reader.read_segment, number, self._signals
            )
        return self._reads[number]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """Return the padded batch of these examples, in this order."""
        lengths = self.length[indices]
        live = np.arange(lengths.max())[None, :] < lengths[:, None]
        numbers = self.segment[indices].tolist()
        self._enter(set(numbers))
        reads = {number: self._wanted(number) for number in numbers}
        try:
            segments = {number: read.result() for number, read in reads.items()}
        except IntegrityError:
            # What is gone or altered may have been withdrawn or rewritten; then that is the reason.
            self.reader.check_pins()
            raise
        pieces = [
            (segments[number], int(np.searchsorted(segments[number].examples, self.examples[i])))
            for i, number in zip(indices, numbers, strict=True)
        ]
        batch: dict[str, Any] = {"attention_mask": torch.from_numpy(live.astype(np.int64))}
        for column in self.reader.plan["columns"]:
            pad = self.reader.plan["pad_id"] if column == "input_ids" else 0
            padded = np.full(live.shape, pad, dtype=np.int64)
            padded[live] = np.concatenate([_rows(s, p, s.tokens[column]) for s, p in pieces])
            batch[column] = torch.from_numpy(padded)
        batch["loss_mask"] = batch["loss_mask"].bool()
        if self._targets is not None:
            batch["labels"] = torch.from_numpy(self._targets[indices].astype(np.float32))
        elif (self._label[indices] >= 0).all():
            batch["labels"] = torch.from_numpy(self._label[indices])
        batch["features"] = {
            name: {
                part: torch.from_numpy(self._gather(name, part, pieces))
                for part in pieces[0][0].features[name]
            }
            for name in self._signals
        }
        return batch

    def _gather(self, name: str, part: str, pieces: list[tuple[Segment, int]]) -> NDArray[Any]:
        return np.concatenate([s.features[name][part][slice(*s.spans[name][p])] for s, p in pieces])


def _rows(segment: Segment, position: int, values: NDArray[Any]) -> NDArray[Any]:
    start = segment.offset[position]
    return values[start : start + segment.length[position]]


def target_positions(batch: dict[str, Tensor]) -> Tensor:
    """Return where a prediction counts: position t iff its target t + 1 is in `loss_mask`."""
    positions = torch.zeros_like(batch["loss_mask"])
    positions[:, :-1] = batch["loss_mask"][:, 1:] & batch["attention_mask"][:, 1:].bool()
    return positions
