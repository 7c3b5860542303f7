"""Query and key of one block from the hidden state below it, without the model it belongs to.

A model of one block is built from the teacher's configuration and given only those parameters that
run before the attention function, which is where the pass ends. No list of architectures says what
they are: they are the ones that query, key and value have a gradient in.
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
"""Keys of a configuration that describe a file, a task or a call."""
IDS = {"vocab_size": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
"""The smallest embedding: what it looks up is replaced."""

QueryKey = tuple[
    Float[Tensor, "batch heads seq d_head"], Float[Tensor, "batch kv_heads seq d_head"]
]


class QueryKeyBlock:
    """Block `layer` of a model up to its attention function, in float32.

    It is no module of whoever holds it: its parameters are neither trained nor saved.

    Args:
        config: The model's Hugging Face configuration.
        layer: Which block, from 1.
        parameters: Its parameters by their names within the block; those that do not run before
            the attention function may be left out.

    Raises:
        IncompatibleError: If the installed transformers has no such block or parameter.
    """

    def __init__(
        self, config: Mapping[str, Any], layer: int, parameters: Mapping[str, Tensor]
    ) -> None:
        # Weights are drawn, if only to be replaced; nobody else's random numbers may notice.
        with torch.random.fork_rng(devices=[]):
            model = AutoModel.from_config(_one_block(config, layer))
        self._model: PreTrainedModel = model.float().eval().requires_grad_(False)
        self._block = find_anatomy(self._model).blocks[0]
        own = dict(self._block.named_parameters())
        for name, value in parameters.items():
            if name not in own or own[name].shape != value.shape:
                found = list(own[name].shape) if name in own else "none"
                raise IncompatibleError(
                    f"attention layer {layer}: parameter {name} has shape {list(value.shape)}, the "
                    f"installed transformers expects {found}; use the version that captured it, or "
                    "capture attention in form qk"
                )
        for name, parameter in own.items():
            # What never runs, the larger part of a block, takes no memory.
            value = parameters.get(name)
            parameter.data = torch.empty(0) if value is None else value.detach().float()

    def __call__(self, hidden: Float[Tensor, "batch seq d"]) -> QueryKey:
        """Return query and key of right-padded hidden states, positions from 0; no gradients.

        What stands at padding is undefined.
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
            total = sum(part.sum() for part in self._run(torch.ones(1, 2, width, device=device)))
            assert isinstance(total, Tensor)
            gradients = torch.autograd.grad(total, parameters, allow_unused=True)
        self._model.requires_grad_(False)
        return [name for name, found in zip(names, gradients, strict=True) if found is not None]

    def _run(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def replace(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if args:
                return (hidden, *args[1:]), kwargs
            return args, kwargs | {"hidden_states": hidden}

        def stop(layer: int, call: AttentionCall) -> None:
            raise _Reached

        # Any id but the one of padding, which some models give no position.
        ids = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        handle = self._block.register_forward_pre_hook(replace, with_kwargs=True)
        try:
            with (
                tap(self._model, attention=[1], values=[1], watch=stop) as record,
                suppress(_Reached),
            ):
                self._model(input_ids=ids)
        finally:
            handle.remove()
        return record.query[1], record.key[1], record.value[1]


class _Reached(Exception):  # noqa: N818 - not an error
    """Query and key are there; what comes after them is not needed."""


def query_key_parameters(model: PreTrainedModel, layer: int) -> dict[str, Tensor]:
    """Return what `QueryKeyBlock` needs of a model's block, by name within the block.

    Raises:
        IncompatibleError: If a model of this block alone cannot be made or run.
    """
    block = find_anatomy(model).blocks[layer - 1]
    own = {name for name, _ in block.named_parameters()}
    parameters = plain_weights(block, own.__contains__)
    alone = QueryKeyBlock(model.config.to_dict(), layer, parameters)
    return {name: parameters[name] for name in alone.used()}


def _one_block(config: Mapping[str, Any], layer: int) -> PreTrainedConfig:
    """The configuration with one block and, of lists with an entry a layer, that block's entry."""
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise IncompatibleError(
            f"model_type is {kind!r}, which the installed transformers does not have, so no block "
            "of it can be made alone; capture attention in form qk"
        )
    family = CONFIG_MAPPING[kind]
    own = family.attribute_map
    known = {field.name for field in dataclasses.fields(family)} - NOT_COMPUTED_WITH
    values: dict[str, Any] = {
        key: plain_values(value) for key, value in config.items() if key in known
    }
    depth = own.get("num_hidden_layers", "num_hidden_layers")
    for key, value in values.items():
        if "layer" in key and isinstance(value, list) and len(value) == values[depth]:
            values[key] = [value[layer - 1]]
    values |= {own.get(key, key): value for key, value in IDS.items()} | {depth: 1}
    return family(**values)
