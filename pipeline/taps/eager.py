"""A model's own attention maps, for layers whose map is more than its query and key.

Eager attention is slow and makes one seq × seq matrix a head, so nothing of it stays but what is
asked of a layer, taken while the pass goes on. A model outside transformers' AttentionInterface
hands out the maps of all its layers or of none, and keeps them all until its pass ends.
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
    """Run a model under eager attention; return the maps of layers 1..L and the base's output.

    The model keeps the attention implementation it has.

    Args:
        model: The model.
        inputs: What it is called with.
        layers: Whose maps, [batch, heads, seq, seq], are wanted.
        take: Given a layer and its map as soon as it is made, returns what to keep of it.

    Raises:
        IncompatibleError: If a layer does not exist or shows no map.
    """
    anatomy = find_anatomy(model)
    anatomy.require_layers(attention=layers)
    maps: dict[int, Tensor] = {}

    def hook(layer: int) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            # The innermost module with a map ends first; those around it pass the same one on.
            if layer not in maps and _has_map(output):
                maps[layer] = take(layer, output[1])

        return keep

    handles = [
        part.register_forward_hook(hook(layer))
        for layer in layers
        for part in anatomy.blocks[layer - 1].modules()
    ]
    is_free = model._can_set_attn_implementation()
    original = model.config._attn_implementation
    try:
        if is_free:
            model.set_attn_implementation(EAGER)
        output = run_base(model, inputs if is_free else {**inputs, "output_attentions": True})
    finally:
        for handle in handles:
            handle.remove()
        if is_free and original is not None:
            model.set_attn_implementation(original)
    if missing := sorted(set(layers) - maps.keys()):
        raise IncompatibleError(
            f"{anatomy.model_class}: layers {missing} give no map under eager attention, expected "
            "one a layer; leave attention out for these layers"
        )
    return dict(sorted(maps.items())), output


def _has_map(output: Any) -> bool:
    """Tell whether a module's output is a state and, beside it, weights over its positions."""
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
