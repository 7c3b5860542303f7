"""Batches built ahead of the step that wants them, and on the device when it does.

One thread looks batches up and counts them while the step before runs. For a GPU they lie in pinned
memory, and are copied on a stream of their own.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, overload

import torch

from pipeline.student.data.stream import StoreDataset

Batch = dict[str, Any]
AHEAD_BATCHES = 2
"""Batches that are built while a step runs, at least; else as many as a step takes."""


@dataclass(frozen=True)
class Fed:
    """One batch, without any reference to the store.

    Attributes:
        pieces: Its micro-batches, on the device when they are taken, in order.
        counts: Units of each term over all of them.
        tokens: Live tokens over all of them.
    """

    pieces: Sequence[Batch]
    counts: dict[str, int]
    tokens: int


def most_waiting(count: int) -> int:
    """Return how many micro-batches wait on a GPU at most while another one is used.

    The first one of every batch that is built, and the next one of the batch in use.

    Args:
        count: Batches that a step takes.
    """
    return count + max(count, AHEAD_BATCHES)


class Feed:
    """Builds the batches that an order names, some ahead, in a thread that ends with `close`.

    Nothing here draws a random number.

    Args:
        dataset: Where examples are looked up; by nobody else meanwhile.
        device: Where batches go.
        count: Units of each term of a batch, see `term_counts`.
        piece_size: Examples of a micro-batch at most; None for whole batches.
    """

    def __init__(
        self,
        dataset: StoreDataset,
        device: torch.device,
        count: Callable[[Batch], dict[str, int]],
        *,
        piece_size: int | None = None,
    ) -> None:
        self._dataset = dataset
        self._count = count
        self._piece_size = piece_size
        self._way = Way(device) if device.type == "cuda" else None
        self._device = device
        dataset.pins_memory = self._way is not None
        self._builder: ThreadPoolExecutor | None = None
        self._order: Iterator[list[int]] | None = None
        self._ahead: deque[Future[Fed]] = deque()

    def take(self, order: Iterator[list[int]], count: int) -> list[Fed]:
        """Return the next `count` batches of an epoch, fewer at its end.

        Further batches are taken from the order at once and built ahead; another iterator than at
        the call before drops those of the earlier one.

        Args:
            order: The epoch's batches as lists of examples; the same iterator until its end.
            count: How many.

        Raises:
            IntegrityError: If a segment that one of these batches needs is missing or altered.
            IncompatibleError: If a signal was withdrawn or rewritten meanwhile.
        """
        if order is not self._order:
            self._drop()
            self._order = order
        builder = self._builder = self._builder or ThreadPoolExecutor(1, "batch-builder")
        missing = most_waiting(count) - len(self._ahead)
        for members in islice(order, max(0, missing)):
            self._ahead.append(builder.submit(self._build, members))
        return [self._ahead.popleft().result() for _ in range(min(count, len(self._ahead)))]

    def close(self) -> None:
        """Give up what was built ahead, end the thread, and let go of the store's segments.

        Once the batch that is being built is done. The feed can be used again.
        """
        self._drop()
        self._order = None
        if self._builder is not None:
            self._builder.shutdown(wait=True)
            self._builder = None
        self._dataset.release()

    def _drop(self) -> None:
        for batch in self._ahead:
            batch.cancel()
        self._ahead.clear()

    def _build(self, members: list[int]) -> Fed:
        size = self._piece_size or len(members)
        pieces = [
            self._dataset.__getitems__(members[first : first + size])
            for first in range(0, len(members), size)
        ]
        found = [self._count(piece) for piece in pieces]
        counts = {term: sum(one[term] for one in found) for term in found[0]}
        tokens = int(self._dataset.length[members].sum())
        if self._way is not None:
            return Fed(Arriving(pieces, self._way), counts, tokens)
        return Fed([_on(piece, self._device) for piece in pieces], counts, tokens)


class Arriving(Sequence[Batch]):
    """Micro-batches in pinned memory: while one is used the next is on its way, and no more."""

    def __init__(self, pieces: list[Batch], way: "Way") -> None:
        self._pieces = pieces
        self._way = way
        self._sent = {0: way.send(pieces[0])}

    def __len__(self) -> int:
        return len(self._pieces)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        sent = self._sent.pop(place, None) or self._way.send(self._pieces[place])
        if place + 1 < len(self):
            self._sent = {place + 1: self._way.send(self._pieces[place + 1])}
        return self._way.arrive(sent)


class Way:
    """The way to a GPU: copies on a stream of their own, beside what is computed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, piece: Batch) -> tuple[Batch, torch.Event]:
        """Begin to copy a piece that lies in pinned memory."""
        # A thread starts out on the first GPU, whichever is this process's own.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            return _on(piece, self._device), self._stream.record_event()

    def arrive(self, sent: tuple[Batch, torch.Event]) -> Batch:
        """Return a piece that was sent; what is computed from it waits for it on the GPU."""
        piece, event = sent
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        # Its memory is not given to a later piece before it was used.
        for tensor in tensors_of(piece):
            tensor.record_stream(stream)
        return piece


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _on(one, device) for key, one in value.items()}
    return value.to(device, non_blocking=True)


def tensors_of(piece: Batch) -> Iterator[torch.Tensor]:
    """Yield every tensor of a micro-batch, those of its features among them."""
    for value in piece.values():
        if isinstance(value, dict):
            yield from tensors_of(value)
        else:
            yield value
