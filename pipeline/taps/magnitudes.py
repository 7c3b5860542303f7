"""RMS of the input to each weight matrix of a block, for pruning the width of students.

Multiplied by |W| it gives the Wanda importance score of a weight (arXiv 2306.11695), which predicts
better than |W| alone what a model can do without.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import IntegrityError
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.inputs import model_columns, model_inputs, run_base

FLOAT64_VALUES = 2**24
"""Values that exist in float64 at a time: 128 MiB."""
PREFIX = "input_rms:"
"""Prefix of a weight's name under which the store keeps its input's RMS."""


def in_float64(rows: Float[Tensor, "rows channels"]) -> Iterator[Float[Tensor, "some channels"]]:
    """Yield the rows that are finite, some at a time."""
    for some in rows.split(max(1, FLOAT64_VALUES // rows.shape[-1])):
        values = some.double()
        yield values[values.isfinite().all(-1)]


@torch.inference_mode()
def input_magnitudes(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], *, is_causal: bool
) -> dict[str, Float[Tensor, " inputs"]]:
    """Return, by weight name, the root mean square of each input feature of a block's matrices.

    Args:
        model: The model, in evaluation mode.
        batches: Right-padded batches with `attention_mask`; padding does not count.
        is_causal: From the tap report: whether the mask can be left out.

    Raises:
        IntegrityError: If no token gives finite inputs to a matrix.
    """
    anatomy = find_anatomy(model)
    sums: dict[str, tuple[int, Tensor]] = {}
    live: Bool[Tensor, "batch seq"] = torch.zeros(0, 0, dtype=torch.bool)

    def listener(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def listen(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs = args[0]
            # Inputs of experts are regrouped and no longer match the batch's tokens.
            if inputs.shape[:-1] == live.shape:
                for tokens in in_float64(inputs[live.to(inputs.device)]):
                    count, total = sums.get(name, (0, torch.zeros(())))
                    sums[name] = (count + len(tokens), total.to(tokens) + tokens.square().sum(0))

        return listen

    handles = [
        part.register_forward_pre_hook(listener(name))
        for name, part in model.named_modules()
        if isinstance(part, (nn.Linear, Conv1D)) and anatomy.block_of(f"{name}.weight") is not None
    ]
    try:
        for batch in batches:
            live = batch["attention_mask"].bool()
            run_base(model, model_inputs(model_columns(model, batch), is_causal=is_causal))
    finally:
        for handle in handles:
            handle.remove()
    magnitudes = {
        f"{name}.weight": (total / count).sqrt().float() for name, (count, total) in sums.items()
    }
    for name, rms in magnitudes.items():
        if not rms.isfinite().all():
            raise IntegrityError(f"{name}: its inputs are not finite; check the teacher")
    return magnitudes
