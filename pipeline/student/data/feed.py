"""Builds batches ahead of the step that needs them, and has them on the device in time.

One thread looks batches up and counts their units while the step before runs. For a GPU they are
built in pinned memory and copied on a stream of their own.
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
"""The least number of batches that are built while a step runs; a step may take more."""


@dataclass(frozen=True)
class Fed:
    """One batch, without any reference to the store.

    Attributes:
        pieces: Its micro-batches in order; each is on the device when it is taken.
        counts: Units of each term over all of them.
        tokens: Live tokens over all of them.
    """

    pieces: Sequence[Batch]
    counts: dict[str, int]
    tokens: int


def most_waiting(count: int) -> int:
    """Return the most micro-batches that wait on a GPU while another one is used.

    These are the first micro-batch of every batch that is built, and the next one of the batch in
    use.

    Args:
        count: Batches of a step.
    """
    return count + max(count, AHEAD_BATCHES)


class Feed:
    """Builds the batches of an order, some ahead, in a thread that ends with `close`.

    It draws no random numbers.

    Args:
        dataset: Looks up examples; nothing else may use it meanwhile.
        device: The device that batches go to.
        count: Returns the units of each term of a batch, see `term_counts`.
        piece_size: The most examples of a micro-batch; None for undivided batches.
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
        self._copies = Copies(device) if device.type == "cuda" else None
        self._device = device
        dataset.pins_memory = self._copies is not None
        self._builder: ThreadPoolExecutor | None = None
        self._order: Iterator[list[int]] | None = None
        self._ahead: deque[Future[Fed]] = deque()

    def take(self, order: Iterator[list[int]], count: int) -> list[Fed]:
        """Return the next `count` batches of an epoch, fewer at its end.

        Further batches are taken from the order at once and built ahead. Another iterator than in
        the call before drops the batches of the earlier one.

        Args:
            order: The epoch's batches as lists of examples; the same iterator until its end.
            count: How many batches.

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
        """Drop the batches that were built ahead, end the thread and release the segments.

        Waits until the batch that is being built is done. The feed can be used again.
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
        by_piece = [self._count(piece) for piece in pieces]
        counts = {term: sum(units[term] for units in by_piece) for term in by_piece[0]}
        tokens = int(self._dataset.length[members].sum())
        if self._copies is not None:
            return Fed(Arriving(pieces, self._copies), counts, tokens)
        return Fed([_on(piece, self._device) for piece in pieces], counts, tokens)


class Arriving(Sequence[Batch]):
    """Micro-batches in pinned memory: while one is used, the next one alone is copied."""

    def __init__(self, pieces: list[Batch], copies: "Copies") -> None:
        self._pieces = pieces
        self._copies = copies
        self._sent = {0: copies.send(pieces[0])}

    def __len__(self) -> int:
        return len(self._pieces)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        sent = self._sent.pop(index, None) or self._copies.send(self._pieces[index])
        if index + 1 < len(self):
            self._sent = {index + 1: self._copies.send(self._pieces[index + 1])}
        return self._copies.arrive(sent)


class Copies:
    """Copies to a GPU on a stream of their own, while other work is computed."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def send(self, piece: Batch) -> tuple[Batch, torch.Event]:
        """Begin to copy a piece from pinned memory."""
        # A new thread uses the first GPU, not this process's own.
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            return _on(piece, self._device), self._stream.record_event()

    def arrive(self, sent: tuple[Batch, torch.Event]) -> Batch:
        """Return a piece that was sent; the GPU waits for the copy before it computes with it."""
        piece, event = sent
        stream = torch.cuda.current_stream(self._device)
        stream.wait_event(event)
        # Its memory must not go to a later piece before it was used.
        for tensor in tensors_of(piece):
            tensor.record_stream(stream)
        return piece


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _on(item, device) for key, item in value.items()}
    return value.to(device, non_blocking=True)


def tensors_of(piece: Batch) -> Iterator[torch.Tensor]:
    """Yield every tensor of a micro-batch, including those of its features."""
    for value in piece.values():
        if isinstance(value, dict):
            yield from tensors_of(value)
        else:
            yield value
