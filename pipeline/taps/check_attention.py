"""Check that softmax(QKᵀ · scaling) over the visible keys equals the model's attention.

The reference is the model's own eager attention. Each layer's attention map is compared as soon as
it is computed and then dropped, so memory holds one seq × seq matrix per head at any depth.
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


def check_attention(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    record: Record,
    modules: Mapping[int, nn.Module],
    comparison: Comparison,
) -> dict[int, Rule]:
    """Compare rebuilt attention with eager attention maps and return each layer's masking rule.

    Args:
        model: The model; afterwards it has our attention implementation.
        inputs: The batch that `record` was taken from.
        record: Query, key and scaling of the layers in `modules`.
        modules: The attention module of each layer.
        comparison: The batch's live positions and the bound.

    Raises:
        IncompatibleError: If a layer's rebuilt attention differs, or it returns no attention map.
    """
    rules: dict[int, Rule] = {}

    def compare(layer: int, output: Any) -> None:
        where = f"attention of layer {layer}"
        remedy = "capture attention with `form: map`, or leave it out for this layer"
        if not (isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor)):
            raise IncompatibleError(
                f"{comparison.model_class}: {where} returns no attention map under eager "
                f"attention, expected one to verify query and key; {remedy}"
            )
        theirs = output[1]
        live = comparison.live.to(theirs.device)
        rule = rules[layer] = _rule(theirs, live)
        lengths, seq = live.sum(1), live.shape[1]
        query, key, scaling = record.query[layer], record.key[layer], record.scaling[layer]
        if theirs.shape != (*query.shape[:3], seq):
            raise IncompatibleError(
                f"{comparison.model_class}: {where} has a map of shape {list(theirs.shape)}, "
                f"expected {[*query.shape[:3], seq]}; {remedy}"
            )

        def ours(example: int, rows: slice) -> Tensor:
            one = slice(example, example + 1)
            visible = visible_keys(lengths[one], seq, rule, rows)
            log_probs = attention_log_probs(query[one, :, rows], key[one], scaling, visible)
            return log_probs[0].exp().transpose(0, 1)

        comparison.require_equal(where, ours, theirs.transpose(1, 2), remedy)

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
    """Check a model's own attention maps: complete, and without effect on the model's output.

    Attention windows and chunks are zeros in a map, so they need no masking rule of their own.

    Returns:
        Each layer's masking rule, read from its map, and the numbers of heads that occur.

    Raises:
        IncompatibleError: If a layer returns no map, a query's probabilities do not sum to 1 over
            the visible keys (attention sinks), or eager attention changes the model's output.
    """
    expected = run_base(model, inputs)
    rules: dict[int, Rule] = {}

    def sums_of(layer: int, theirs: Tensor) -> Tensor:
        """Read the rule from a map, and keep of it the sum over the visible keys alone."""
        live = comparison.live.to(theirs.device)
        rules[layer] = _rule(theirs, live)
        sums = theirs.new_empty(theirs.shape[:3], dtype=torch.float32)
        for example, lengths in enumerate(live.sum(1, keepdim=True)):
            visible = visible_keys(lengths, live.shape[1], rules[layer])[0]
            sums[example] = theirs[example].float().masked_fill(~visible, 0.0).sum(-1)
        return sums.transpose(1, 2)

    sums, output = eager_maps(model, inputs, layers, sums_of)
    remedy = "leave attention out for this model"
    comparison.require_equal("output under eager attention", output, expected, remedy)
    for layer, values in sums.items():
        comparison.require_equal(
            f"sum over the keys of attention layer {layer}",
            values,
            torch.ones_like(values),
            "leave attention out for this layer",
        )
    return rules, {values.shape[2] for values in sums.values()}


def _rule(attention: Tensor, live: Tensor) -> Rule:
    """Return "full" if any live query attends to a later key, else "causal"."""
    later = torch.ones(attention.shape[2:], dtype=torch.bool, device=live.device).triu(1)
    for heads, tokens in zip(attention, live, strict=True):
        # Over the heads first: what is left is one map an example.
        if (heads.abs().amax(0).bool() & later & tokens[:, None]).any():
            return "full"
    return "causal"


def check_masks(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    live: Bool[Tensor, "batch seq"],
    rules: Mapping[int, Rule],
    max_length: int,
    *,
    is_causal: bool,
) -> None:
    """Check on a row of `max_length` tokens that every layer still masks by its rule.

    Attention windows and chunks have no effect on shorter rows, so the batch may not show them. The
    row repeats the longest one of `inputs`.

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
                f"{type(model).__name__} layer {layer} does not mask a row of {max_length} tokens "
                f"by its {rules[layer]} rule (a window?), expected the same rule at every length; "
                "capture this layer's attention with `form: map`, leave it out, or "
                "tokenize with a smaller max_length"
            )

    with tap(model, attention=rules.keys(), watch=compare):
        run_base(model, model_inputs(batch, is_causal=is_causal))
