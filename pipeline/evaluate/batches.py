"""Right-padded batches of one split, longest rows first, bounded by tokens instead of rows.

Rows of similar length share a batch, so little is padding. Memory peaks in the first batch, where
running out of it wastes the least work.
"""

import inspect
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import datasets
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from tqdm import tqdm

from pipeline.errors import ConfigError

# Everything a model may want beside the ids; padded with 0, the first segment's id.
EXTRA_COLUMNS = ("token_type_ids",)


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of a split as inputs of a model.

    Attributes:
        rows: Positions of the rows in their split.
        lengths: Tokens of each row, before padding.
        input_ids: Ids, padded on the right.
        attention_mask: One for a token, zero for padding; None where nothing is padded, so that
            causal models keep their fast path without a mask.
        extra: Further inputs of the model, by name.
    """

    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    input_ids: Int[Tensor, "batch seq"]
    attention_mask: Int[Tensor, "batch seq"] | None
    extra: dict[str, Int[Tensor, "batch seq"]]

    def inputs(self) -> dict[str, Tensor]:
        """Return the keyword arguments of a forward pass."""
        inputs = {"input_ids": self.input_ids, **self.extra}
        if self.attention_mask is not None:
            inputs["attention_mask"] = self.attention_mask
        return inputs


def plan_batches(lengths: Sequence[int], batch_tokens: int) -> list[tuple[int, ...]]:
    """Assign rows to batches of at most `batch_tokens` tokens, padding included.

    Every row is in exactly one batch; a row longer than `batch_tokens` has a batch to itself.

    Args:
        lengths: Tokens of each row.
        batch_tokens: Largest rows times longest row of a batch.

    Returns:
        Row positions of each batch, longest rows first; the same for the same lengths.

    Raises:
        ConfigError: If `batch_tokens` is not positive.
    """
    if batch_tokens < 1:
        raise ConfigError(
            f"batch_tokens: found {batch_tokens}, expected at least 1; set it to what memory holds"
        )
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    batches: list[tuple[int, ...]] = []
    start = 0
    while start < len(order):
        longest = max(1, lengths[order[start]])
        stop = start + max(1, batch_tokens // longest)
        batches.append(tuple(order[start:stop]))
        start = stop
    return batches


def batches(
    split: datasets.Dataset,
    *,
    model: nn.Module,
    pad_id: int,
    batch_tokens: int,
    device: torch.device,
    label: str,
) -> Iterator[Batch]:
    """Yield a split as batches on a device, with progress and the time left on stderr.

    Args:
        split: Rows with `input_ids`, and `token_type_ids` where the tokenizer makes them.
        model: Decides which of the extra columns are passed on.
        pad_id: Id written into padding.
        batch_tokens: Largest rows times longest row of a batch.
        device: Where the tensors go.
        label: What the progress bar says.

    Raises:
        ConfigError: If the split has no rows or `batch_tokens` is not positive.
    """
    if len(split) == 0:
        raise ConfigError(f"{label}: found 0 rows, expected at least 1; run prepare and tokenize")
    accepted = inspect.signature(model.forward).parameters
    names = [name for name in EXTRA_COLUMNS if name in split.column_names and name in accepted]
    all_ids: list[list[int]] = split["input_ids"][:]
    all_extra: dict[str, list[list[int]]] = {name: split[name][:] for name in names}
    all_lengths = [len(ids) for ids in all_ids]
    plan = plan_batches(all_lengths, batch_tokens)
    # A log file gets a line now and then, a terminal a live bar.
    interval = 0.5 if sys.stderr.isatty() else 15.0
    with tqdm(
        total=sum(all_lengths), desc=label, unit="tok", unit_scale=True, mininterval=interval
    ) as progress:
        for rows in plan:
            lengths = tuple(all_lengths[row] for row in rows)
            yield Batch(
                rows=rows,
                lengths=lengths,
                input_ids=_pad([all_ids[row] for row in rows], pad_id).to(device),
                attention_mask=_attention_mask(lengths, device),
                extra={
                    name: _pad([column[row] for row in rows], 0).to(device)
                    for name, column in all_extra.items()
                },
            )
            progress.update(sum(lengths))


def _pad(rows: Sequence[Sequence[int]], value: int) -> Int[Tensor, "batch seq"]:
    """Stack rows of unequal length, padded on the right."""
    tensors = [torch.tensor(row, dtype=torch.long) for row in rows]
    return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)


def pad_flags(rows: Sequence[Sequence[bool]], device: torch.device) -> Bool[Tensor, "batch seq"]:
    """Stack rows of flags; padding is False."""
    return _pad([[int(flag) for flag in row] for row in rows], 0).bool().to(device)


def _attention_mask(
    lengths: Sequence[int], device: torch.device
) -> Int[Tensor, "batch seq"] | None:
    """One where a row has a token, or None when all rows are equally long."""
    if min(lengths) == max(lengths):
        return None
    positions = torch.arange(max(lengths))
    return (positions < torch.tensor(lengths)[:, None]).long().to(device)
