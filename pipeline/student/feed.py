"""Batches on the device before the step that wants them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from pipeline.student.stream import StoreDataset

Batch = dict[str, Any]


@dataclass(frozen=True)
class Fed:
    """One batch: its micro-batches, on the device, and the units of each term over all of them."""

    pieces: list[Batch]
    counts: dict[str, int]


class Feed:
    """Builds the batches that an order names.

    Args:
        dataset: Where examples are looked up.
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
        self._device = device
        self._count = count
        self._piece_size = piece_size

    def take(self, order: Iterator[list[int]], count: int) -> list[Fed]:
        """Return the next `count` batches of an epoch, fewer at its end.

        Args:
            order: The epoch's batches as lists of examples; the same iterator until its end.
            count: How many.
        """
        return [self._build(members) for members in islice(order, count)]

    def _build(self, members: list[int]) -> Fed:
        size = self._piece_size or len(members)
        pieces = [
            self._dataset.__getitems__(members[first : first + size])
            for first in range(0, len(members), size)
        ]
        found = [self._count(piece) for piece in pieces]
        counts = {term: sum(one[term] for one in found) for term in found[0]}
        return Fed([_on(piece, self._device) for piece in pieces], counts)


def _on(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: _on(one, device) for key, one in value.items()}
    return value.to(device)
