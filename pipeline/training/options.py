"""How a model is optimised, the same words for teachers and students. Needs no torch."""

from importlib.util import find_spec
from typing import Annotated, Literal

from pydantic import Field

from pipeline.errors import ConfigError
from pipeline.section import Positive, Section

HALF = ("bfloat16", "float16")
"""Precisions that autocast to half the bytes."""
CUDA_ONLY = {
    "float16": "where gradients are scaled to fit it",
    "tf32": "the only kind that has this mode",
}
"""Precisions that only CUDA has, and why."""


class TrainOptions(Section):
    """One optimisation: an optimiser with warm-up, a schedule and gradient clipping.

    `batch_size` counts examples of a batch on one process; `steps`, if given, replaces `epochs`.
    `warmup` is a share of the run. Intervals are in optimiser steps.
    """

    epochs: Positive = 3
    steps: Positive | None = None
    batch_size: Positive = 32
    gradient_accumulation_steps: Positive = 1
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    schedule: Literal["linear", "cosine", "constant_with_warmup"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.05
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    optimizer: Literal["adamw", "adamw_8bit", "adafactor"] = "adamw"
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    gradient_checkpointing: bool = False
    seed: Annotated[int, Field(ge=0)] = 0
    log_every: Positive = 10
    save_every: Positive = 200


def check_options(options: TrainOptions, device: str | None, *, key: str) -> None:
    """Refuse what this machine cannot train with, before anything long starts.

    Args:
        options: The optimisation.
        device: A torch device; None where it is not known yet.
        key: Where the options stand, for the message.

    Raises:
        ConfigError: If the precision needs another device or the optimiser another package.
    """
    on_cuda = device is None or device.startswith("cuda")
    if options.precision in CUDA_ONLY and not on_cuda:
        raise ConfigError(
            f"{key}.precision: {options.precision} on {device}, expected a CUDA device, "
            f"{CUDA_ONLY[options.precision]}; set bfloat16 or float32"
        )
    if options.optimizer == "adamw_8bit" and find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"{key}.optimizer: adamw_8bit needs bitsandbytes, which is not installed; run pip "
            "install 'decant-kd[quantized]', or set adamw or adafactor"
        )
