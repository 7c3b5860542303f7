"""A model's own logits at selected positions, so that the check's memory has a bound.

A model whose `forward` takes `logits_to_keep` computes logits at these positions alone. Its head
treats every position alike, so the positions that are left out need no logits for a comparison.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.taps.configuration import size_of, text_part

LARGEST_LOGITS = 2**28
"""Logits of a batch that the check computes at once: 1 GiB in float32."""
KEEP = "logits_to_keep"


def takes_positions(model: PreTrainedModel) -> bool:
    """Tell whether a model can compute logits at selected positions alone."""
    return KEEP in inspect.signature(model.forward).parameters


def positions_to_check(
    model: PreTrainedModel, live: Bool[Tensor, "batch seq"]
) -> Int[Tensor, " some"] | None:
    """Return evenly spaced positions and each row's last; None if all fit, or have to be computed.

    The result is on the CPU, because a model's head may be on any device.
    """
    batch, seq = live.shape
    count = LARGEST_LOGITS // max(1, batch * size_of(text_part(model.config), "vocab_size"))
    if count >= seq or not takes_positions(model):
        return None
    even = torch.linspace(0, seq - 1, max(2, count - batch)).long()
    return torch.cat([even, live.sum(1).cpu() - 1]).unique()


def run_at(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    positions: Int[Tensor, " some"] | None,
    **options: Any,
) -> Any:
    """Run a model and return its output, whose logits are those of `positions`."""
    output = model(**inputs, **options, **({} if positions is None else {KEEP: positions}))
    if positions is not None and output.logits.shape[1] == inputs["input_ids"].shape[1]:
        # Some models accept the argument and ignore it.
        output.logits = output.logits[:, positions.to(output.logits.device)]
    return output
