"""Mean and deviation of every channel over a fixed sample of the corpus, one file a layer.

They standardise the feature loss and the int8 form: raw hidden states have outlier channels that
would own both.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import Tensor
from tqdm import tqdm

from pipeline.errors import IntegrityError
from pipeline.provenance import write_bytes_atomically
from pipeline.store.signals import Signal
from pipeline.teacher.capture.forward import Batch, Place, TappedTeacher, place_of

SAMPLE_TOKENS = 8192
"""Tokens of the first training segments that the statistics are taken of."""
SMALLEST_DEVIATION = 1e-6


def value_name(signal: Signal) -> str:
    """Return the name of the values whose channels a signal's statistics describe."""
    return "head_input" if signal.kind == "logits" else "hidden"


def sample_batches(batches: Iterable[Batch], description: str) -> Iterator[Batch]:
    """Yield the first batches, until they hold the sample's tokens; a bar says how far it is."""
    tokens = 0
    with tqdm(total=SAMPLE_TOKENS, desc=description, unit="token", leave=False) as bar:
        for batch in batches:
            yield batch
            tokens += len(batch.rows)
            bar.update(len(batch.rows))
            if tokens >= SAMPLE_TOKENS:
                return


def measure_channels(
    teacher: TappedTeacher, batches: Iterable[Batch], signals: Sequence[Signal]
) -> dict[str, dict[str, Tensor]]:
    """Return float32 `mean` and `deviation` (at least 1e-6) of each signal's channels.

    Sums are taken in float64, so the order of tokens does not show.

    Raises:
        IntegrityError: If the sample holds values that are not finite.
    """
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}
    wanted: defaultdict[Place, list[Signal]] = defaultdict(list)
    for signal in signals:
        wanted[place_of(signal)].append(signal)
    for batch in sample_batches(batches, "channel statistics"):
        for place, values in teacher.values(batch):
            for signal in wanted[place]:
                rows = values[value_name(signal)].double()
                rows = rows[torch.isfinite(rows).all(dim=-1)]
                count, total, square = sums.get(signal.name, (0, torch.zeros(()), torch.zeros(())))
                sums[signal.name] = (
                    count + len(rows),
                    total.to(rows) + rows.sum(0),
                    square.to(rows) + rows.square().sum(0),
                )
    result = {}
    for name, (count, total, square) in sums.items():
        mean = total / count
        deviation = (square / count - mean.square()).clamp_min(0).sqrt()
        if not torch.isfinite(deviation).all():
            raise IntegrityError(f"{name}: channel statistics are not finite; check the teacher")
        result[name] = {
            "mean": mean.float(),
            "deviation": deviation.clamp_min(SMALLEST_DEVIATION).float(),
        }
    return result


def save_channels(path: Path, statistics: dict[str, Tensor]) -> None:
    """Write one signal's statistics."""
    arrays = {key: np.ascontiguousarray(value.cpu().numpy()) for key, value in statistics.items()}
    write_bytes_atomically(path, save(arrays))
