"""Proof that softmax(QKᵀ · scaling) over a rule's keys is the attention the model computes.

The reference is the model's own eager attention. Each layer's map is compared as it is made and
then dropped, so the cost is one seq × seq matrix a head, whatever the depth.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.taps.comparison import Comparison
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
    live = comparison.live

    def compare(layer: int, output: Any) -> None:
        where = f"attention of layer {layer}"
        remedy = "leave attention out for this layer"
        if not (isinstance(output, tuple) and len(output) > 1 and isinstance(output[1], Tensor)):
            raise IncompatibleError(
                f"{comparison.model_class}: {where} gives no map under eager attention, expected "
                f"one to verify query and key; {remedy}"
            )
        theirs = output[1].float()
        rules[layer] = "full" if theirs.triu(1).transpose(1, 2)[live].any() else "causal"
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


def check_masks(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
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
    lengths = inputs["attention_mask"].sum(1)
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
                "every length; leave attention out for this layer or tokenize with a smaller "
                "max_length"
            )

    with tap(model, attention=rules.keys(), watch=compare):
        run_base(model, model_inputs(batch, is_causal=is_causal))
