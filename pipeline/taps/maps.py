"""Proof that softmax(QKᵀ · scaling) over a rule's keys is the attention the model computes.

The reference is the model's own eager attention. Each layer's map is compared as it is made and
then dropped, so the cost is one seq × seq matrix a head, whatever the depth.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.taps.comparison import Comparison
from pipeline.taps.eager import eager_maps
from pipeline.taps.inputs import model_inputs, run_base
from pipeline.taps.scores import Rule, attention_log_probs, visible_keys
from pipeline.taps.tap import AttentionCall, Record, prepare_attention, tap


def check_maps(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    record: Record,
    modules: Mapping[int, nn.Module],
    comparison: Comparison,
) -> dict[int, Rule]:
    """Compare rebuilt attention with eager maps and return each layer's rule, read off its map.

    Args:
        model: The model; it ends with our attention implementation.
        inputs: The batch that `record` was taken from.
        record: Query, key and scaling of the layers in `modules`.
        modules: The attention module of each layer.
        comparison: The batch's live positions and the bound.

    Raises:
        IncompatibleError: If a layer's rebuilt attention differs, or it shows no map.
    """
    rules: dict[int, Rule] = {}

    def compare(layer: int, output: Any) -> None:
        where = f"attention of layer {layer}"
        remedy = "capture attention with `form: map`, or leave it out for this layer"
        if not (isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor)):
            raise IncompatibleError(
                f"{comparison.model_class}: {where} gives no map under eager attention, expected "
                f"one to verify query and key; {remedy}"
            )
        theirs = output[1].float()
        live = comparison.live.to(theirs.device)
        rules[layer] = _rule(theirs, live)
        visible = visible_keys(live.sum(1), live.shape[1], rules[layer])
        ours = attention_log_probs(
            record.query[layer], record.key[layer], record.scaling[layer], visible
        ).exp()
        comparison.require_equal(where, ours.transpose(1, 2), theirs.transpose(1, 2), remedy)

    def hook(layer: int) -> Any:
        return lambda module, args, output: compare(layer, output)

    handles = [module.register_forward_hook(hook(layer)) for layer, module in modules.items()]
    model.set_attn_implementation("eager")
    try:
        run_base(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    prepare_attention(model)
    return dict(sorted(rules.items()))


def check_own_maps(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    layers: Collection[int],
    comparison: Comparison,
) -> tuple[dict[int, Rule], set[int]]:
    """See that a model is itself under eager attention and its maps are whole.

    Windows and chunks are zeros in a map, so they need no rule of their own.

    Returns:
        Each layer's rule, read off its map, and the numbers of heads found.

    Raises:
        IncompatibleError: If a layer shows no map, a map's rows do not sum to 1 over the keys of
            its rule (attention sinks), or eager attention changes what the model computes.
    """
    expected = run_base(model, inputs)
    maps, found = eager_maps(model, inputs, layers)
    remedy = "leave attention out for this model"
    comparison.require_equal("output under eager attention", found, expected, remedy)
    rules: dict[int, Rule] = {}
    for layer, theirs in maps.items():
        live = comparison.live.to(theirs.device)
        rules[layer] = _rule(theirs, live)
        visible = visible_keys(live.sum(1), live.shape[1], rules[layer])
        sums = theirs.float().masked_fill(~visible, 0.0).sum(-1).transpose(1, 2)
        comparison.require_equal(
            f"sum over the keys of attention layer {layer}",
            sums,
            torch.ones_like(sums),
            "leave attention out for this layer",
        )
    return rules, {theirs.shape[1] for theirs in maps.values()}


def _rule(attention: Tensor, live: Tensor) -> Rule:
    """Read off a map whether any live query sees a key after it."""
    return "full" if attention.triu(1).transpose(1, 2)[live].any() else "causal"


def check_masks(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    live: Bool[Tensor, "batch seq"],
    rules: Mapping[int, Rule],
    max_length: int,
    *,
    is_causal: bool,
) -> None:
    """Run one row of `max_length` tokens and see that every layer still masks by its rule.

    A window or a chunk leaves shorter rows alone, so the batch may not have shown it. The row is
    the longest of `inputs`, repeated.

    Raises:
        IncompatibleError: If a layer hides keys that its rule shows, or shows keys that it hides.
    """
    lengths = live.sum(1)
    row = int(lengths.argmax())
    length = int(lengths[row])
    if max_length <= length:
        return
    repeats = -(-max_length // length)
    batch = {
        name: value[row : row + 1, :length].repeat(1, repeats)[:, :max_length]
        for name, value in inputs.items()
    }

    def compare(layer: int, call: AttentionCall) -> None:
        if call.mask is None:
            return
        seen = call.mask if call.mask.dtype == torch.bool else call.mask == 0
        row_length = torch.tensor([max_length], device=seen.device)
        if not (seen == visible_keys(row_length, max_length, rules[layer])).all():
            raise IncompatibleError(
                f"{type(model).__name__} layer {layer} masks a row of {max_length} tokens "
                f"otherwise than by its {rules[layer]} rule (a window?), expected the rule at "
                "every length; capture this layer's attention with `form: map`, leave it out, or "
                "tokenize with a smaller max_length"
            )

    with tap(model, attention=rules.keys(), watch=compare):
        run_base(model, model_inputs(batch, is_causal=is_causal))
