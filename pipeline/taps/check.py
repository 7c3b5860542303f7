"""Check that tapped values equal the model's own, before anything is written.

One batch is run both tapped and, as reference, with the model unchanged. A layer that differs is
refused by name, so no list of supported architectures is needed. Costs four to six forward passes
of one batch.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError, is_out_of_memory
from pipeline.taps.anatomy import Anatomy, find_anatomy
from pipeline.taps.below import QueryKeyBlock, query_key_parameters
from pipeline.taps.check_attention import check_attention, check_masks, check_own_maps
from pipeline.taps.comparison import Comparison, bound_of
from pipeline.taps.head import HeadSpec, apply_head, head_parameters, read_head_spec
from pipeline.taps.inputs import model_columns, model_inputs, run_base
from pipeline.taps.own_logits import positions_to_check, run_at
from pipeline.taps.scores import Rule
from pipeline.taps.tap import AttentionCall, Record, tap

logger = logging.getLogger(__name__)
HEAD_REMEDY = "leave the head out and keep its logits in another form"


@dataclass(frozen=True, kw_only=True)
class TapRequest:
    """The taps that a capture or a training needs, which `check_taps` verifies.

    Args:
        hidden: Layers whose hidden states will be tapped.
        attention: Layers whose query and key will be tapped.
        values: Layers whose value will be tapped. Query and key of these layers are checked too.
        below: Layers whose query and key will be rebuilt from the hidden state below.
        maps: Layers whose attention maps will be the model's own, under eager attention.
        head: Whether the head's input will be tapped.
        logits: Whether logits are needed. They can be computed from the head's input if the result
            equals the model's logits. If not, nothing is refused and the report's `head` is None.
    """

    hidden: Collection[int] = ()
    attention: Collection[int] = ()
    values: Collection[int] = ()
    below: Collection[int] = ()
    maps: Collection[int] = ()
    head: bool = False
    logits: bool = False

    @property
    def query_key(self) -> frozenset[int]:
        """The layers whose query and key are recorded for the check."""
        return frozenset({*self.attention, *self.values, *self.below})

    @property
    def attended(self) -> frozenset[int]:
        """All layers that must have attention heads."""
        return self.query_key | frozenset(self.maps)


@dataclass(frozen=True)
class TapReport:
    """Result of the check; `rule` and `scaling` by attention layer, no `scaling` for own maps.

    `causal` means that padding on the right changes no live position when the mask is left out.
    `heads`, `kv_heads` and `d_head` are those of the recorded tensors, or the configuration's if
    no attention was requested; `d_value` is the width of a value head, 0 if no value was requested.
    `head` rebuilds the model's logits; it is None if no head was requested, or if only logits were
    and they cannot be rebuilt.
    """

    model_class: str
    depth: int
    d_teacher: int
    causal: bool
    heads: int
    kv_heads: int
    d_head: int
    d_value: int
    rule: dict[int, Rule]
    scaling: dict[int, float]
    head: HeadSpec | None


def check_taps(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    request: TapRequest,
    *,
    max_length: int | None = None,
) -> TapReport:
    """Compare every requested tap with the model itself on one batch.

    Afterwards the model has our attention implementation if query, key or value were requested,
    else its original one.

    Args:
        model: The model, on its device, in its dtype.
        inputs: A right-padded batch with `input_ids`, `attention_mask` and any other columns; the
            model gets those that its `forward` has a parameter for.
        request: The taps to check.
        max_length: Longest row that will ever be run, in tokens. A row of that length is run too,
            to find attention windows that are longer than the batch.

    Raises:
        IncompatibleError: If a tap differs from the model, with the layer, the difference and the
            bound.
        ValueError: If the batch is not right-padded or has no row of two tokens.
    """
    anatomy = find_anatomy(model)
    anatomy.require_layers(hidden=request.hidden, attention=request.attended)
    live = _live_positions(inputs["attention_mask"])
    if request.attended and live.sum(1).max() < 2:
        raise ValueError(
            "no row has two tokens, so attention masks cannot be checked; use a longer row"
        )
    comparison = Comparison(anatomy.model_class, live, bound_of(model))
    was_training, original = model.training, model.config._attn_implementation
    model.eval()
    try:
        with torch.no_grad():
            report = _check(
                model, anatomy, model_columns(model, inputs), comparison, request, max_length
            )
    except BaseException as error:
        if original is not None and model.config._attn_implementation != original:
            model.set_attn_implementation(original)
        if isinstance(error, IncompatibleError) and anatomy.model_class not in str(error):
            raise IncompatibleError(f"{anatomy.model_class}: {error}") from error
        raise
    finally:
        model.train(was_training)
    return report


def _check(
    model: PreTrainedModel,
    anatomy: Anatomy,
    inputs: Mapping[str, Tensor],
    comparison: Comparison,
    request: TapRequest,
    max_length: int | None,
) -> TapReport:
    """Run all comparisons; the model is in evaluation mode."""
    positions = positions_to_check(model, comparison.live)
    at = comparison
    if positions is not None:
        at = replace(comparison, live=comparison.live[:, positions.to(comparison.live.device)])
    states, other_modules, logits, head_input = _reference(model, anatomy, inputs, positions)
    modules: dict[int, nn.Module] = {}

    def remember(layer: int, call: AttentionCall) -> None:
        modules[layer] = call.module

    # First, because tapping changes the model's attention implementation.
    own_rules, map_heads = (
        check_own_maps(model, inputs, request.maps, comparison) if request.maps else ({}, set())
    )
    with tap(
        model,
        hidden={*request.hidden, *(layer - 1 for layer in request.below)},
        attention=request.query_key,
        values=request.values,
        head=request.head or request.logits or positions is not None,
        watch=remember,
    ) as record:
        tapped = run_at(model, inputs, positions).logits
    _check_hidden(record, anatomy, states, other_modules, comparison)
    del states, other_modules
    remedy = "leave attention out for this model"
    if head_input is not None and record.head_input is not None:
        # Logits are compared at some positions, what they are computed from at all.
        what = "head input under tapped attention"
        comparison.require_equal(what, record.head_input, head_input, remedy)
    at.require_equal("logits under tapped attention", tapped, logits, remedy)
    del tapped, head_input
    spec = _head_spec(model, record, logits, at, positions, request)
    # Eager attention needs the memory.
    del logits
    rules = check_attention(model, inputs, record, modules, comparison) if modules else {}
    _check_below(model, record, request.below, comparison)
    causal = not {"full"} & {*rules.values(), *own_rules.values()} and _is_causal(
        model, anatomy, inputs, comparison
    )
    if not causal:
        _check_padding(model, inputs, comparison)
    if rules and max_length is not None:
        check_masks(model, inputs, comparison.live, rules, max_length, is_causal=causal)
    all_rules: dict[int, Rule] = {**own_rules, **rules}
    heads, kv_heads, d_head = _sizes(record, anatomy, map_heads)
    return TapReport(
        model_class=anatomy.model_class,
        depth=anatomy.depth,
        d_teacher=anatomy.width,
        causal=causal,
        heads=heads,
        kv_heads=kv_heads,
        d_head=d_head,
        d_value=_value_width(record, anatomy, kv_heads),
        rule=dict(sorted(all_rules.items())),
        scaling=dict(sorted(record.scaling.items())),
        head=spec,
    )


def _reference(
    model: PreTrainedModel,
    anatomy: Anatomy,
    inputs: Mapping[str, Tensor],
    positions: Int[Tensor, " some"] | None,
) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, Tensor]], Tensor, Tensor | None]:
    """Run the unchanged model.

    Returns:
        Its hidden states, input and output of each module next to the blocks, its logits at the
        positions, and the input of its head if these are not all positions.
    """
    other_modules: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            other_modules.append((args[0], output))

    handles = [
        part.register_forward_hook(keep)
        for part in anatomy.owner.children()
        if not isinstance(part, nn.ModuleList)
    ]
    try:
        with tap(model, head=positions is not None) as record:
            output = run_at(model, inputs, positions, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    states = _by_layer(model, inputs, output.hidden_states or (), other_modules)
    return states, other_modules, output.logits, record.head_input


def _by_layer(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    states: tuple[Tensor, ...],
    other_modules: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, ...]:
    """Return a model's own states by our layer numbers: the first block's input, then outputs.

    Mamba omits the input, and returns its last state both before and after the final norm.
    """
    if len(states) < 2 or not any(
        given is states[-2] and result is states[-1] for given, result in other_modules
    ):
        return states
    return (model.get_input_embeddings()(inputs["input_ids"]), *states[:-1])


def _check_hidden(
    record: Record,
    anatomy: Anatomy,
    states: tuple[Tensor, ...],
    other_modules: list[tuple[Tensor, Tensor]],
    comparison: Comparison,
) -> None:
    """Compare with the model's own states; its last may be after the final norm, ours is before."""
    if record.hidden and len(states) != anatomy.depth + 1:
        raise IncompatibleError(
            f"{anatomy.model_class} returns {len(states)} hidden states, expected "
            f"{anatomy.depth + 1} to verify its layers; leave hidden states out for this model"
        )
    for layer, state in record.hidden.items():
        theirs = states[layer]
        if layer == anatomy.depth:
            norms = [
                given
                for given, result in other_modules
                if result.shape == theirs.shape == given.shape
                and torch.equal(result, theirs.to(result.device))
            ]
            theirs = norms[-1] if norms else theirs
        comparison.require_equal(f"hidden layer {layer}", state, theirs, "leave this layer out")


def _head_spec(
    model: PreTrainedModel,
    record: Record,
    logits: Tensor,
    comparison: Comparison,
    positions: Int[Tensor, " some"] | None,
    request: TapRequest,
) -> HeadSpec | None:
    """Return the checked head if requested; for logits, only if it reproduces them."""
    if request.head:
        return _check_head(model, record, logits, comparison, positions)
    if not request.logits:
        return None
    try:
        return _check_head(model, record, logits, comparison, positions)
    except (IncompatibleError, RuntimeError, ValueError) as error:
        # Says nothing about the head; how logits are computed must not depend on memory.
        if is_out_of_memory(error):
            raise
        logger.info("logits come from the full model, all tokens at once: %s", error)
        return None


def _check_head(
    model: PreTrainedModel,
    record: Record,
    logits: Tensor,
    comparison: Comparison,
    positions: Int[Tensor, " some"] | None,
) -> HeadSpec:
    """Rebuild the logits from the head's input alone."""
    spec = read_head_spec(model)
    weight, bias = head_parameters(model)
    given = record.head_input
    assert given is not None  # the tap recorded it
    if positions is not None:
        given = given[:, positions.to(given.device)]
    if logits.shape != (*given.shape[:-1], len(weight)):
        raise IncompatibleError(
            f"{comparison.model_class}: logits have shape {list(logits.shape)}, expected "
            f"{[*given.shape[:-1], len(weight)]} from the head; {HEAD_REMEDY}"
        )
    weight, bias = weight.to(given), None if bias is None else bias.to(given)
    comparison.require_equal(
        f"logits rebuilt with {spec}",
        lambda example, rows: apply_head(given[example, rows], weight, bias, spec),
        logits,
        HEAD_REMEDY,
    )
    return spec


def _check_below(
    model: PreTrainedModel, record: Record, layers: Collection[int], comparison: Comparison
) -> None:
    """Rebuild query and key as a store reader does, but from the exact hidden state."""
    for layer in sorted(layers):
        remedy = "capture this layer's attention in form qk"
        try:
            block = QueryKeyBlock(model.config.to_dict(), layer, query_key_parameters(model, layer))
            rebuilt = block(record.hidden[layer - 1])
        except (RuntimeError, TypeError, ValueError) as error:
            if is_out_of_memory(error):
                raise
            raise IncompatibleError(
                f"{comparison.model_class}: block {layer} does not run by itself "
                f"({' '.join(str(error).split())[:200]}), expected query and key from hidden layer "
                f"{layer - 1}; {remedy}"
            ) from error
        for name, ours, theirs in zip(
            ("query", "key"), rebuilt, (record.query[layer], record.key[layer]), strict=True
        ):
            what = f"{name} of layer {layer} rebuilt from hidden layer {layer - 1}"
            comparison.require_equal(what, ours.transpose(1, 2), theirs.transpose(1, 2), remedy)


def _is_causal(
    model: PreTrainedModel, anatomy: Anatomy, inputs: Mapping[str, Tensor], comparison: Comparison
) -> bool:
    """Tell whether masking each row's last token changes no position before it.

    Only models that declare themselves causal are tested: in half precision the bound alone could
    not decide.
    """
    lengths = comparison.live.sum(1, keepdim=True)
    position = torch.arange(comparison.live.shape[1], device=lengths.device)
    before = position < lengths - 1
    if not anatomy.is_causal or not before.any() or "attention_mask" not in inputs:
        return anatomy.is_causal
    # A row of one token keeps it: attention over no keys is undefined.
    mask = (before | (position == 0)).to(inputs["attention_mask"].dtype)
    batch = dict(inputs) | {"attention_mask": mask}
    with_mask = run_base(model, batch)
    without = run_base(model, model_inputs(batch, is_causal=True))
    return comparison.difference(without, with_mask, before) <= comparison.bound


def _check_padding(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], comparison: Comparison
) -> None:
    """Refuse a model whose live positions change with the ids at padding.

    A model that ignores the mask (FNet) computes different states for a row in every batch, so its
    features can be neither stored nor compared.
    """
    ids, live = inputs["input_ids"], comparison.live
    if live.all():
        return
    # An id from the row itself is not a special one.
    changed = dict(inputs) | {"input_ids": torch.where(live, ids, ids[:, :1])}
    difference = comparison.difference(run_base(model, changed), run_base(model, inputs))
    if not difference <= comparison.bound:
        raise IncompatibleError(
            f"{comparison.model_class}: states of a row differ by {difference:.2g} with other ids "
            f"in its padding, expected at most {comparison.bound:g}; it ignores the attention "
            "mask, choose another model"
        )


def _sizes(record: Record, anatomy: Anatomy, map_heads: set[int]) -> tuple[int, int, int]:
    """Return heads, key heads and head width, which must be the same in all layers of a store."""
    shapes = {
        (query.shape[1], record.key[layer].shape[1], query.shape[3])
        for layer, query in record.query.items()
    }
    if len(shapes) > 1:
        raise IncompatibleError(
            f"{anatomy.model_class} has attention layers of the shapes {sorted(shapes)} (heads, "
            "key heads, width), expected one; choose layers of one shape"
        )
    sizes = shapes.pop() if shapes else (anatomy.heads, anatomy.kv_heads, anatomy.head_dim)
    if map_heads - {sizes[0]}:
        raise IncompatibleError(
            f"{anatomy.model_class} has attention maps of {sorted(map_heads)} heads, expected "
            f"{sizes[0]}; leave attention out for the layers that differ"
        )
    return sizes


def _value_width(record: Record, anatomy: Anatomy, kv_heads: int) -> int:
    """Return the width of a value head; there must be as many value heads as key heads."""
    shapes = {(value.shape[1], value.shape[3]) for value in record.value.values()}
    if len(shapes) > 1 or any(heads != kv_heads for heads, _ in shapes):
        raise IncompatibleError(
            f"{anatomy.model_class} has values of the shapes {sorted(shapes)} (heads, width), "
            f"expected one shape of {kv_heads} heads; leave value out for the layers that differ"
        )
    return shapes.pop()[1] if shapes else 0


def _live_positions(attention_mask: Tensor) -> Bool[Tensor, "batch seq"]:
    """Return the mask as booleans; taps and store support right padding only."""
    live = attention_mask.bool()
    if not torch.equal(live, live.cumprod(1).bool()) or not live[:, 0].all():
        raise ValueError("attention_mask has gaps, left padding or an empty row; pad on the right")
    return live
