"""Low-rank adapters (LoRA, arXiv 2106.09685): only they train, and the export has them merged.

They are peft's, whose layers replace the adapted ones. The student's class and its other names stay
the same, so taps, losses and checkpoints work as without adapters.
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
"""Modules that peft adapts as modules, or that are not adapted."""
NUMBER = re.compile(r"\.\d+\.")


def add_adapters(
    model: PreTrainedModel, options: LoraOptions, *, fresh: Collection[str] = ()
) -> None:
    """Add adapters to a model and freeze everything else; outputs stay the same until it trains.

    Random weights are drawn from torch's generator. Matrices without an adapter, such as
    embeddings, are listed in the log with their share of the weights.

    Args:
        model: The student; all parameters have the same dtype.
        options: Rank, scale and targets of the adapters.
        fresh: Names of parameters that no checkpoint filled. They train directly and get no
            adapter.

    Raises:
        ConfigError: If peft is not installed, or no module has a name in `target_modules`.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ConfigError(
            "model.lora: the package peft is not installed; run pip install 'decant-kd[lora]'"
        ) from error
    # Heads get no adapter: the losses multiply with a language model's head themselves, and a new
    # head trains directly. peft's own all-linear would include a classifier's head.
    newly = {name.rpartition(".")[0] for name in fresh}
    linear = [name for name, part in model.named_modules() if isinstance(part, nn.Linear | Conv1D)]
    base = f"{model.base_model_prefix}."
    left_out = [name for name in linear if name in newly or not name.startswith(base)]
    plain = [name for name in _plain_matrices(model) if name.startswith(base) and name not in fresh]
    adapted: Collection[str] = options.target_modules
    if options.target_modules == "all-linear":
        adapted = set(linear) - set(left_out)
    else:
        plain = [name for name in plain if any(_ends(name, ending) for ending in adapted)]
        # peft warns of an ending that only fits such matrices.
        modules = [ending for ending in adapted if any(_ends(name, ending) for name in linear)]
        adapted = modules if modules or plain else adapted
    if options.dropout:
        plain = []  # peft has no dropout for parameters
    config = LoraConfig(
        r=options.r,
        lora_alpha=options.alpha,  # pyright: ignore[reportArgumentType]  (a float is as good)
        lora_dropout=options.dropout,
        target_modules=sorted(adapted),
        target_parameters=plain or None,
        exclude_modules=left_out or None,
        # GPT-2's matrices are stored transposed; without this peft warns.
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
    count = sum(p.numel() for p in model.parameters())
    logger.info("adapters of rank %d: %d of %d parameters train", options.r, trained, count)
    _log_the_rest(matrices.keys() - _adapted_names(model), matrices, total)


def _ends(name: str, ending: str) -> bool:
    return f".{name}".endswith(f".{ending}")


def _plain_matrices(model: PreTrainedModel) -> list[str]:
    """Return the names of matrices outside linear modules, such as experts and routers.

    Mixture-of-experts families keep all experts in one parameter of three dimensions.
    """
    return [
        f"{name}.{key}"
        for name, part in model.named_modules()
        if not isinstance(part, KNOWN)
        for key, value in part.named_parameters(recurse=False)
        if (value.ndim == 3 or (value.ndim == 2 and key == "weight")) and "bias" not in key
    ]


def _adapted_names(model: PreTrainedModel) -> set[str]:
    """Return the original names of matrices that have an adapter."""
    return {
        f"{name.replace('.base_layer', '')}.{getattr(part, 'parameter_name', 'weight')}"
        for name, part in model.named_modules()
        if hasattr(part, "get_base_layer")
    }


def _log_the_rest(names: Collection[str], sizes: dict[str, int], total: int) -> None:
    """Log which matrices have no adapter, one entry for the same matrix of all blocks."""
    kinds: dict[str, int] = {}
    for name in sorted(names):
        kind = NUMBER.sub(".*.", name)
        kinds[kind] = kinds.get(kind, 0) + sizes[name]
    if kinds:
        each = ", ".join(f"{kind} ({100 * size / total:.1f}%)" for kind, size in kinds.items())
        logger.info("without an adapter, of all weights: %s", each)


def merge_adapters(model: PreTrainedModel) -> None:
    """Merge every adapter into its matrix and remove it; outputs stay the same.

    A model without adapters is not changed.
    """
    adapted = [
        (name, part) for name, part in model.named_modules() if hasattr(part, "get_base_layer")
    ]
    for _, part in adapted:
        part.merge()  # pyright: ignore[reportCallIssue]
    for name, part in adapted:
        parent, _, child = name.rpartition(".")
        # Several adapters of one module are nested.
        if child != "base_layer":
            setattr(model.get_submodule(parent), child, part.get_base_layer())  # pyright: ignore[reportCallIssue]
    if adapted:
        model.requires_grad_(True)
        if hasattr(model, "peft_config"):
            del model.peft_config
