"""How large what a block's matrices read is: with a weight's own size, how much it matters.

Of a weight, |W| · ‖x‖ tells better than |W| alone what a model can do without (Wanda,
arXiv 2306.11695).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import IntegrityError
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.inputs import model_columns, model_inputs, run_base

PREFIX = "input_rms:"
"""What stands before a weight's name where its input's magnitudes are kept beside it."""


@torch.inference_mode()
def input_magnitudes(
    model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]], *, is_causal: bool
) -> dict[str, Float[Tensor, " inputs"]]:
    """Return, by weight, the root mean square of each feature that a block's matrix reads.

    Args:
        model: The model, in evaluation mode.
        batches: Right-padded batches with `attention_mask`; padding does not count.
        is_causal: As in a tap report: whether the mask may be left out.

    Raises:
        IntegrityError: If they are not finite in any row.
    """
    anatomy = find_anatomy(model)
    sums: dict[str, tuple[int, Tensor]] = {}
    live: Bool[Tensor, "batch seq"] = torch.zeros(0, 0, dtype=torch.bool)

    def listener(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def listen(module: nn.Module, args: tuple[Any, ...]) -> None:
            given = args[0]
            # What experts read is no longer told apart by token.
            if given.shape[:-1] == live.shape:
                rows = given[live.to(given.device)].double()
                # As with the channels' statistics: an example that is skipped has no say.
                rows = rows[rows.isfinite().all(-1)]
                count, total = sums.get(name, (0, torch.zeros(())))
                sums[name] = (count + len(rows), total.to(rows) + rows.square().sum(0))

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
    found = {
        f"{name}.weight": (total / count).sqrt().float() for name, (count, total) in sums.items()
    }
    for name, magnitudes in found.items():
        if not magnitudes.isfinite().all():
            raise IntegrityError(f"{name}: reads values that are not finite; check the teacher")
    return found
