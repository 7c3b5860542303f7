"""Low-rank adapters in a student: only they train, and the export is the plain model again.

LoRA, arXiv 2106.09685, by peft, whose layers replace the adapted ones while the student's class and
the names around them stay: taps, losses and checkpoints see the model they know.
"""

import logging
from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import ConfigError, in_short
from pipeline.student.origin import LoraOptions

logger = logging.getLogger(__name__)


def add_adapters(
    model: PreTrainedModel, options: LoraOptions, *, fresh: Collection[str] = ()
) -> None:
    """Put adapters into a model and freeze all else; its outputs stay the same until it trains.

    Random weights are drawn from torch's generator.

    Args:
        model: The student, of one dtype.
        options: Rank, scale and places of the adapters.
        fresh: Names of parameters that no checkpoint filled; they are trained whole, for nothing
            of them is worth keeping, and get no adapter.

    Raises:
        ConfigError: If peft is not installed, or no module has the names asked for.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "model.lora: the package peft is not installed; run pip install 'decant-kd[lora]'"
        ) from error
    # Heads stay plain: the losses apply a language model's themselves, and a matrix that nobody has
    # trained needs no low-rank change. What peft calls all-linear would take a classifier's in.
    newly = {name.rpartition(".")[0] for name in fresh}
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D)]
    base = f"{model.base_model_prefix}."
    left_out = [name for name in linear if name in newly or not name.startswith(base)]
    adapted: Collection[str] = options.target_modules
    if options.target_modules == "all-linear":
        adapted = set(linear) - set(left_out)
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # pyright: ignore[reportArgumentType]  (a float is as good)
        lora_dropout=options.dropout,
        target_modules=sorted(adapted),
        exclude_modules=left_out or None,
        # GPT-2's matrices are stored transposed; peft says so only by a warning.
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in model.modules()),
    )
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in fresh}
    try:
        inject_adapter_in_model(config, model)
    except ValueError as error:
        reason = in_short(error)
        raise ConfigError(
            f"model.lora.target_modules: no adapter comes of {options.target_modules!r} "
            f"({reason}); name endings of linear modules, or all-linear"
        ) from error
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    logger.info("adapters of rank %d: %d of %d parameters train", options.r, trained, total)


def merge_adapters(model: PreTrainedModel) -> None:
    """Add every adapter's product to its matrix and take the adapters out; outputs stay the same.

    A model without adapters stays as it is.
    """
    adapted = [
        (name, part) for name, part in model.named_modules() if hasattr(part, "get_base_layer")
    ]
    for name, part in adapted:
        parent, _, child = name.rpartition(".")
        part.merge()  # pyright: ignore[reportCallIssue]
        setattr(model.get_submodule(parent), child, part.get_base_layer())  # pyright: ignore[reportCallIssue]
    if adapted:
        model.requires_grad_(True)
        if hasattr(model, "peft_config"):
            del model.peft_config
