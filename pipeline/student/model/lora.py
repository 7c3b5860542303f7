"""Low-rank adapters in a student: only they train, and the export is the plain model again.

LoRA, arXiv 2106.09685, by peft, whose layers replace the adapted ones while the student's class and
the names around them stay: taps, losses and checkpoints see the model they know.
"""

import logging
import re
from collections.abc import Collection

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from pipeline.errors import ConfigError, in_short
from pipeline.student.model.origin import LoraOptions

logger = logging.getLogger(__name__)
KNOWN = (nn.Linear, Conv1D, nn.Embedding, nn.modules.conv._ConvNd)
"""Modules whose matrices are adapted by themselves, or not at all."""
NUMBER = re.compile(r"\.\d+\.")


def add_adapters(
    model: PreTrainedModel, options: LoraOptions, *, fresh: Collection[str] = ()
) -> None:
    """Put adapters into a model and freeze all else; its outputs stay the same until it trains.

    Random weights are drawn from torch's generator. Matrices that stay as they are, such as
    embeddings, are named in the log with their share of the weights.

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
    plain = [name for name in _plain_matrices(model) if name.startswith(base) and name not in fresh]
    adapted: Collection[str] = options.target_modules
    if options.target_modules == "all-linear":
        adapted = set(linear) - set(left_out)
    else:
        plain = [name for name in plain if any(_ends(name, one) for one in adapted)]
        # peft warns of an ending that only fits such matrices.
        modules = [one for one in adapted if any(_ends(name, one) for name in linear)]
        adapted = modules if modules or plain else adapted
    if options.dropout:
        plain = []  # their forward pass is not theirs alone, so dropout has no place in it
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # pyright: ignore[reportArgumentType]  (a float is as good)
        lora_dropout=options.dropout,
        target_modules=sorted(adapted),
        target_parameters=plain or None,
        exclude_modules=left_out or None,
        # GPT-2's matrices are stored transposed; peft says so only by a warning.
        fan_in_fan_out=any(isinstance(part, Conv1D) for part in model.modules()),
    )
    total = sum(p.numel() for p in model.parameters())
    matrices = {
        name: p.numel() for name, p in model.named_parameters() if p.ndim > 1 and name not in fresh
    }
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
    there = sum(p.numel() for p in model.parameters())
    logger.info("adapters of rank %d: %d of %d parameters train", options.r, trained, there)
    _tell_the_rest(matrices.keys() - _adapted_names(model), matrices, total)


def _ends(name: str, ending: str) -> bool:
    return f".{name}".endswith(f".{ending}")


def _plain_matrices(model: PreTrainedModel) -> list[str]:
    """Return the names of matrices that no linear module holds, such as experts and routers.

    A family of mixtures keeps its experts in one parameter of three dimensions, expert by expert.
    """
    return [
        f"{name}.{key}"
        for name, part in model.named_modules()
        if not isinstance(part, KNOWN)
        for key, value in part.named_parameters(recurse=False)
        if (value.ndim == 3 or (value.ndim == 2 and key == "weight")) and "bias" not in key
    ]


def _adapted_names(model: PreTrainedModel) -> set[str]:
    """Return the names, as they were before, of matrices that have an adapter."""
    return {
        f"{name.replace('.base_layer', '')}.{getattr(part, 'parameter_name', 'weight')}"
        for name, part in model.named_modules()
        if hasattr(part, "get_base_layer")
    }


def _tell_the_rest(names: Collection[str], sizes: dict[str, int], total: int) -> None:
    """Name the matrices that nothing changes, one line for those of all blocks."""
    kinds: dict[str, int] = {}
    for name in sorted(names):
        kind = NUMBER.sub(".*.", name)
        kinds[kind] = kinds.get(kind, 0) + sizes[name]
    if kinds:
        each = ", ".join(f"{kind} ({100 * size / total:.1f}%)" for kind, size in kinds.items())
        logger.info("without an adapter, of all weights: %s", each)


def merge_adapters(model: PreTrainedModel) -> None:
    """Add every adapter's product to its matrix and take the adapters out; outputs stay the same.

    A model without adapters stays as it is.
    """
    adapted = [
        (name, part) for name, part in model.named_modules() if hasattr(part, "get_base_layer")
    ]
    for _, part in adapted:
        part.merge()  # pyright: ignore[reportCallIssue]
    for name, part in adapted:
        parent, _, child = name.rpartition(".")
        # Of several adapters of one module, each is around the next one.
        if child != "base_layer":
            setattr(model.get_submodule(parent), child, part.get_base_layer())  # pyright: ignore[reportCallIssue]
    if adapted:
        model.requires_grad_(True)
        if hasattr(model, "peft_config"):
            del model.peft_config
