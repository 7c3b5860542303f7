"""Mean and standard deviation of every channel over a fixed sample of the corpus, per layer.

The feature loss and quantised forms use them to standardise hidden states, whose outlier channels
would otherwise dominate.
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
from pipeline.taps.magnitudes import in_float64
from pipeline.teacher.capture.forward import Batch, FeatureKey, TappedTeacher, feature_key

SAMPLE_TOKENS = 8192
"""Tokens of the first training segments over which statistics are computed."""
SMALLEST_DEVIATION = 1e-6
NONE = torch.zeros(())


def value_name(signal: Signal) -> str:
    """Return the name of the values whose channels a signal's statistics describe."""
    return "head_input" if signal.kind == "logits" else "hidden"


def sample_batches(batches: Iterable[Batch], description: str) -> Iterator[Batch]:
    """Yield the first batches until they hold `SAMPLE_TOKENS`, with a progress bar."""
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

    Sums are in float64, so the order of tokens has no visible effect.

    Raises:
        IntegrityError: If no token of the sample has finite values.
    """
    sums: dict[str, tuple[int, Tensor, Tensor]] = {}
    by_feature: defaultdict[FeatureKey, list[Signal]] = defaultdict(list)
    for signal in signals:
        by_feature[feature_key(signal)].append(signal)
    for batch in sample_batches(batches, "channel statistics"):
        for feature, values in teacher.values(batch):
            for signal in by_feature[feature]:
                for rows in in_float64(values[value_name(signal)]):
                    count, total, square = sums.get(signal.name, (0, NONE, NONE))
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
    """Write the statistics of a layer."""
    arrays = {key: np.ascontiguousarray(value.cpu().numpy()) for key, value in statistics.items()}
    write_bytes_atomically(path, save(arrays))
