"""A model's own attention maps, for layers whose maps do not follow from query and key alone.

Eager attention is slow and computes one seq × seq matrix per head, so each layer's map is reduced
to the requested part during the pass. A model outside transformers' AttentionInterface returns the
maps of all layers or of none, and holds them all until its pass ends.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.inputs import run_base

EAGER = "eager"


def eager_maps(
    model: PreTrainedModel,
    inputs: Mapping[str, Any],
    layers: Collection[int],
    take: Callable[[int, Tensor], Tensor] = lambda _, attention: attention,
) -> tuple[dict[int, Tensor], Float[Tensor, "batch seq d"]]:
    """Run a model under eager attention; return attention maps by layer and the base's output.

    Afterwards the model has its previous attention implementation.

    Args:
        model: The model.
        inputs: Its keyword arguments.
        layers: The layers, of 1..L, whose maps [batch, heads, seq, seq] to return.
        take: Called with a layer and its map as soon as it is computed; returns what to keep.

    Raises:
        IncompatibleError: If a layer does not exist or returns no attention map.
    """
    anatomy = find_anatomy(model)
    anatomy.require_layers(attention=layers)
    maps: dict[int, Tensor] = {}

    def hook(layer: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            # The innermost module with a map ends first; modules around it return the same map.
            if layer not in maps and _has_map(output):
                maps[layer] = take(layer, output[1])

        return keep

    handles = [
        part.register_forward_hook(hook(layer))
        for layer in layers
        for part in anatomy.blocks[layer - 1].modules()
    ]
    is_settable = model._can_set_attn_implementation()
    original = model.config._attn_implementation
    try:
        if is_settable:
            model.set_attn_implementation(EAGER)
        output = run_base(model, inputs if is_settable else {**inputs, "output_attentions": True})
    finally:
        for handle in handles:
            handle.remove()
        if is_settable and original is not None:
            model.set_attn_implementation(original)
    if missing := sorted(set(layers) - maps.keys()):
        raise IncompatibleError(
            f"{anatomy.model_class}: layers {missing} return no attention map under eager "
            "attention, expected one per layer; leave attention out for these layers"
        )
    return dict(sorted(maps.items())), output


def _has_map(output: Any) -> bool:
    """Tell whether a module's output is a hidden state followed by attention weights."""
    if not (isinstance(output, tuple) and len(output) > 1):
        return False
    state, weights = output[:2]
    return (
        isinstance(state, Tensor)
        and isinstance(weights, Tensor)
        and state.ndim == 3
        and weights.ndim == 4
        and weights.shape[0] == state.shape[0]
        and weights.shape[2] == weights.shape[3] == state.shape[1]
    )
