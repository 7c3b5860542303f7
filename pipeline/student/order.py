"""In which order examples are trained on: a pure function of (seed, epoch), planned as lists.

Nothing is read for it, so a resumed run skips batches without decoding them.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from pipeline.errors import ConfigError

WINDOW_BATCHES = 8
"""Batches whose examples are sorted by length together: less padding, and still well mixed."""


class BatchOrder(Sampler[list[int]]):
    """The batches of an epoch as lists of examples: a batch sampler for a `DataLoader`.

    Every epoch holds every example once, in the same number of batches: what does not fill a batch
    is carried to the next pool. On several ranks a batch of all ranks is planned and each takes its
    share, so n ranks run the batches that one rank of n times the batch size runs.
    """

    def __init__(
        self,
        segment: NDArray[np.int64],
        length: NDArray[np.int64],
        *,
        batch_size: int,
        pool_segments: int,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        """Plan epochs over examples.

        Args:
            segment: Each example's segment.
            length: Each example's tokens.
            batch_size: Examples in a batch of one rank.
            pool_segments: Segments that are in memory and mixed together.
            seed: Seed of the order.
            rank: Which rank's share iteration gives.
            ranks: How many there are.

        Raises:
            ConfigError: If there are fewer examples than ranks.
        """
        if len(segment) < ranks:
            raise ConfigError(
                f"the store has {len(segment)} training examples for {ranks} ranks; expected at "
                "least one each"
            )
        self._length = length
        self._batch = batch_size * ranks
        self._pool_segments = pool_segments
        self._seed = seed
        self._rank, self._ranks = rank, ranks
        self._epoch = 0
        by_segment = np.argsort(segment, kind="stable")
        numbers, first = np.unique(segment[by_segment], return_index=True)
        self._members = dict(
            zip(numbers.tolist(), np.split(by_segment, first[1:].tolist()), strict=True)
        )

    def __len__(self) -> int:
        # Fewer left over than ranks make no batch of their own: each rank needs an example.
        whole, rest = divmod(len(self._length), self._batch)
        return whole + (rest >= self._ranks)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that iteration will give."""
        self._epoch = epoch

    def segment_order(self) -> list[int]:
        """Return the epoch's order of segments."""
        generator = np.random.default_rng([self._seed, self._epoch])
        return generator.permutation(list(self._members)).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        generator = np.random.default_rng([self._seed, self._epoch, 1])
        order = self.segment_order()
        carried: list[int] = []
        for first in range(0, len(order), self._pool_segments):
            pool = [self._members[number] for number in order[first : first + self._pool_segments]]
            examples = [*carried, *generator.permutation(np.concatenate(pool)).tolist()]
            is_last = first + self._pool_segments >= len(order)
            # One batch stays behind, so that a rest too small for the ranks has one to join.
            whole = max(0, len(examples) // self._batch - 1) * self._batch
            carried = [] if is_last else examples[whole:]
            for batch in self._bucketed(examples if is_last else examples[:whole], generator):
                yield batch[self._rank :: self._ranks]

    def _bucketed(self, examples: list[int], generator: np.random.Generator) -> Iterator[list[int]]:
        count = len(examples) // self._batch + (len(examples) % self._batch >= self._ranks)
        for first in range(0, count, WINDOW_BATCHES):
            last = min(first + WINDOW_BATCHES, count)
            stop = len(examples) if last == count else last * self._batch
            part = sorted(examples[first * self._batch : stop], key=lambda i: (-self._length[i], i))
            starts = [i * self._batch for i in range(last - first)]
            batches = [part[a:b] for a, b in zip(starts, [*starts[1:], None], strict=True)]
            for i in generator.permutation(len(batches)).tolist():
                yield batches[i]
