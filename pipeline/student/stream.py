"""Batches from the store: segments in random order, a pool of a few, length-bucketed batches.

The order is a pure function of (seed, epoch), written down as lists of examples before anything is
read, so a resumed run skips batches without decoding them. Segments of the next pool are read ahead
in a thread; what leaves here is still in stored dtypes and is widened on the device.
"""

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from pipeline.axes import TRAIN, Axis
from pipeline.errors import ConfigError
from pipeline.store.reader import Segment, StoreReader

WINDOW_BATCHES = 8
"""Batches whose examples are sorted by length together: less padding, and still well mixed."""


class BatchOrder(Sampler[list[int]]):
    """The batches of an epoch as lists of examples: a batch sampler for a `DataLoader`.

    Every epoch has the same number of batches: what does not fill a batch is carried to the next
    pool.
    """

    def __init__(
        self,
        segment: NDArray[np.int64],
        length: NDArray[np.int64],
        *,
        batch_size: int,
        pool_segments: int,
        seed: int,
    ) -> None:
        """Plan epochs over examples.

        Args:
            segment: Each example's segment.
            length: Each example's tokens.
            batch_size: Examples in a batch.
            pool_segments: Segments that are in memory and mixed together.
            seed: Seed of the order.
        """
        if not len(segment):
            raise ConfigError("the store has no training example; expected at least 1")
        self._segment = segment
        self._length = length
        self.batch_size = batch_size
        self._pool_segments = pool_segments
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return -(-len(self._segment) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that iteration will give."""
        self._epoch = epoch

    def segment_order(self) -> NDArray[np.int64]:
        """Return the epoch's order of segments."""
        generator = np.random.default_rng([self._seed, self._epoch])
        return generator.permutation(np.unique(self._segment))

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self._seed, self._epoch, 1])
        order = self.segment_order()
        carried: list[int] = []
        for first in range(0, len(order), self._pool_segments):
            pool = order[first : first + self._pool_segments]
            members = generator.permutation(np.flatnonzero(np.isin(self._segment, pool)))
            examples = [*carried, *members.tolist()]
            is_last = first + self._pool_segments >= len(order)
            whole = len(examples) // self.batch_size * self.batch_size
            carried = [] if is_last else examples[whole:]
            yield from self._bucketed(examples if is_last else examples[:whole], generator)

    def _bucketed(self, examples: list[int], generator: np.random.Generator) -> Iterator[list[int]]:
        window = self.batch_size * WINDOW_BATCHES
        for first in range(0, len(examples), window):
            part = examples[first : first + window]
            part.sort(key=lambda i: (-self._length[i], i))
            batches = [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
            for i in generator.permutation(len(batches)).tolist():
                yield batches[i]


class StoreDataset(Dataset[dict[str, Any]]):
    """Looks up batches of examples of one split, with their features, in a store.

    A batch is right-padded. Token-axis features hold live tokens only, flat, in the order of the
    padded batch's live positions; example-axis features one row an example.
    """

    def __init__(
        self,
        reader: StoreReader,
        signals: Sequence[str],
        *,
        split: str = TRAIN,
        cached_segments: int = 8,
    ) -> None:
        self._reader = reader
        self._signals = list(signals)
        self._axis = {name: reader.signal(name).declaration.axis for name in signals}
        table = reader.examples
        numbers = reader.segments(split)
        chosen = np.isin(table["segment"], numbers)
        for name in signals:
            for segment, receipt in reader.signal(name).receipts.items():
                if receipt.skipped:
                    in_segment = table["segment"] == segment
                    chosen &= ~(in_segment & np.isin(table["slot"], receipt.skipped))
        self.examples = np.flatnonzero(chosen)
        self.segment = table["segment"][self.examples].astype(np.int64)
        self.length = table["length"][self.examples].astype(np.int64)
        self._label = table["label"][self.examples]
        self._cache: OrderedDict[int, Segment | Future[Segment]] = OrderedDict()
        self._capacity = cached_segments
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="segment-reader")
        self._ahead: list[int] = []

    def __len__(self) -> int:
        return len(self.examples)

    def read_ahead(self, segments: Sequence[int]) -> None:
        """Say in which order segments will be wanted."""
        self._ahead = list(segments)

    def _segment_data(self, number: int) -> Segment:
        if number not in self._cache:
            self._cache[number] = self._reading.submit(
                self._reader.read_segment, number, self._signals
            )
        entry = self._cache[number]
        if isinstance(entry, Future):
            entry = self._cache[number] = entry.result()
        self._cache.move_to_end(number)
        if number in self._ahead:
            position = self._ahead.index(number)
            for following in self._ahead[position + 1 : position + 1 + self._capacity // 2]:
                if following not in self._cache:
                    self._cache[following] = self._reading.submit(
                        self._reader.read_segment, following, self._signals
                    )
        while len(self._cache) > 2 * self._capacity:
            self._cache.popitem(last=False)
        return entry

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """Return the padded batch of these examples, in this order."""
        lengths = self.length[indices]
        live = np.arange(lengths.max())[None, :] < lengths[:, None]
        pieces: list[tuple[Segment, int]] = []
        for i in indices:
            segment = self._segment_data(int(self.segment[i]))
            pieces.append((segment, int(np.searchsorted(segment.examples, self.examples[i]))))
        batch: dict[str, Any] = {"attention_mask": torch.from_numpy(live.astype(np.int64))}
        for column in self._reader.plan["columns"]:
            pad = self._reader.plan["pad_id"] if column == "input_ids" else 0
            padded = np.full(live.shape, pad, dtype=np.int64)
            padded[live] = np.concatenate([_rows(s, p, s.tokens[column]) for s, p in pieces])
            batch[column] = torch.from_numpy(padded)
        batch["loss_mask"] = batch["loss_mask"].bool()
        if (self._label[indices] >= 0).all():
            batch["labels"] = torch.from_numpy(self._label[indices].astype(np.int64))
        batch["features"] = {
            name: {
                part: torch.from_numpy(self._gather(name, part, pieces))
                for part in pieces[0][0].features[name]
            }
            for name in self._signals
        }
        return batch

    def _gather(self, name: str, part: str, pieces: list[tuple[Segment, int]]) -> NDArray[Any]:
        if self._axis[name] == Axis.EXAMPLE:
            return np.stack([s.features[name][part][s.slot[p]] for s, p in pieces])
        return np.concatenate([_rows(s, p, s.features[name][part]) for s, p in pieces])


def _rows(segment: Segment, position: int, values: NDArray[Any]) -> NDArray[Any]:
    start = segment.offset[position]
    return values[start : start + segment.length[position]]


def target_positions(batch: dict[str, Tensor]) -> Tensor:
    """Return where a prediction counts: position t iff its target t + 1 is in `loss_mask`."""
    positions = torch.zeros_like(batch["loss_mask"])
    positions[:, :-1] = batch["loss_mask"][:, 1:] & batch["attention_mask"][:, 1:].bool()
    return positions
