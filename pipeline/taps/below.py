"""Rebuild a block's query and key from its input hidden state, without the rest of the model.

A one-block model is built from the teacher's configuration and holds only the parameters that run
before the attention function, where its forward pass stops. They are found without a list of
architectures: they are the parameters that query, key and value have a gradient for.
"""

import dataclasses
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.configuration import plain_values
from pipeline.taps.tap import AttentionCall, tap
from pipeline.taps.weights import plain_weights

NOT_COMPUTED_WITH = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "model_type"),
        *("transformers_version", "quantization_config", "problem_type", "num_labels", "id2label"),
        *("label2id", "output_hidden_states", "output_attentions", "return_dict"),
    }
)
"""Configuration keys that describe a file, a task or a call and do not affect computation."""
SMALLEST_EMBEDDING = {
    "vocab_size": 2,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": None,
}
"""Configuration values of the smallest embedding, whose output is replaced anyway."""

QueryKey = tuple[
    Float[Tensor, "batch heads seq d_head"], Float[Tensor, "batch kv_heads seq d_head"]
]


class QueryKeyBlock:
    """Block `layer` of a model up to its attention function, in float32.

    It is not an `nn.Module`, so a model that holds it neither trains nor saves its parameters.

    Args:
        config: The model's Hugging Face configuration.
        layer: Number of the block, from 1.
        parameters: The block's parameters by name within the block; those that do not run before
            the attention function may be left out.

    Raises:
        IncompatibleError: If the installed transformers has no such block or parameter.
    """

    def __init__(
        self, config: Mapping[str, Any], layer: int, parameters: Mapping[str, Tensor]
    ) -> None:
        # Initialisation draws random weights that are replaced below.
        with torch.random.fork_rng(devices=[]):
            model = AutoModel.from_config(_one_block(config, layer))
        self._model: PreTrainedModel = model.float().eval().requires_grad_(False)
        self._block = find_anatomy(self._model).blocks[0]
        own = dict(self._block.named_parameters())
        for name, value in parameters.items():
            if name not in own or own[name].shape != value.shape:
                expected = list(own[name].shape) if name in own else "none"
                raise IncompatibleError(
                    f"attention layer {layer}: parameter {name} has shape {list(value.shape)}, the "
                    f"installed transformers expects {expected}; use the version that captured "
                    "it, or capture attention in form qk"
                )
        for name, parameter in own.items():
            # Parameters that never run, most of a block, take no memory.
            value = parameters.get(name)
            parameter.data = torch.empty(0) if value is None else value.detach().float()

    def __call__(self, hidden: Float[Tensor, "batch seq d"]) -> QueryKey:
        """Return query and key of right-padded hidden states, positions from 0; no gradients.

        Values at padding positions are undefined.
        """
        self._model.to(hidden.device)  # pyright: ignore[reportArgumentType]
        with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
            query, key, _ = self._run(hidden.float())
        return query, key

    def used(self) -> list[str]:
        """Return the names of the parameters that run before the attention function."""
        names, parameters = zip(*self._block.named_parameters(), strict=True)
        width = self._model.config.get_text_config().hidden_size
        self._model.requires_grad_(True)
        with torch.enable_grad():
            device = parameters[0].device
            self._model.to(device)  # pyright: ignore[reportArgumentType]
            ones = torch.ones(1, 2, width, device=device)
            total = sum(tensor.sum() for tensor in self._run(ones))
            assert isinstance(total, Tensor)
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        self._model.requires_grad_(False)
        return [name for name, grad in zip(names, gradients, strict=True) if grad is not None]

    def _run(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": hidden}

        def stop(layer: int, call: AttentionCall) -> None:
            raise _AttentionReached

        # Not the padding id, which gets no position in some models.
        ids = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        handle = self._block.register_forward_pre_hook(replace, with_kwargs=True)
        try:
            with (
                tap(self._model, attention=[1], values=[1], watch=stop) as record,
                suppress(_AttentionReached),
            ):
                self._model(input_ids=ids)
        finally:
            handle.remove()
        return record.query[1], record.key[1], record.value[1]


class _AttentionReached(Exception):  # noqa: N818 - not an error
    """Ends the forward pass once query and key are recorded."""


def query_key_parameters(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    """Return the parameters that `QueryKeyBlock` needs for one block, by name within the block.

    Raises:
        IncompatibleError: If a one-block model cannot be built or run.
    """
    block = find_anatomy(model).blocks[layer - 1]
    own = {name for name, _ in block.named_parameters()}
    parameters = plain_weights(block, own.__contains__)
    query_key_block = QueryKeyBlock(model.config.to_dict(), layer, parameters)
    return {name: parameters[name] for name in query_key_block.used()}


def _one_block(config: Mapping[str, Any], layer: int) -> PreTrainedConfig:
    """Return a configuration of one block; per-layer lists keep only that block's entry."""
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise IncompatibleError(
            f"model_type is {kind!r}, which the installed transformers does not have, so its block "
            "cannot be built; capture attention in form qk"
        )
    family = CONFIG_MAPPING[kind]
    aliases = family.attribute_map
    fields = {field.name for field in dataclasses.fields(family)} - NOT_COMPUTED_WITH
    values: dict[str, Any] = {
        key: plain_values(value) for key, value in config.items() if key in fields
    }
    depth = aliases.get("num_hidden_layers", "num_hidden_layers")
    for key, value in values.items():
        if "layer" in key and isinstance(value, list) and len(value) == values[depth]:
            values[key] = [value[layer - 1]]
    values |= {aliases.get(key, key): value for key, value in SMALLEST_EMBEDDING.items()}
    values[depth] = 1
    return family(**values)
