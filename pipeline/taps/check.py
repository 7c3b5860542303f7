"""Proof by value, before anything is written, that the taps say what the model does.

One batch is run tapped and, as reference, as the model came. What differs is refused by layer, so
no list of supported architectures exists. Costs four to six forward passes of one batch.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.taps.anatomy import Anatomy, find_anatomy
from pipeline.taps.below import QueryKeyBlock, query_key_parameters
from pipeline.taps.comparison import Comparison, bound_of
from pipeline.taps.head import HeadSpec, apply_head, head_parameters, read_head_spec
from pipeline.taps.inputs import model_columns, model_inputs, run_base
from pipeline.taps.maps import check_maps, check_masks, check_own_maps
from pipeline.taps.padding import check_padding
from pipeline.taps.scores import Rule
from pipeline.taps.tap import AttentionCall, Record, tap

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TapReport:
    """What the check found; `rule` and `scaling` by attention layer, no `scaling` of own maps.

    `causal` says that padding on the right changes no live position when the mask is left out.
    `heads`, `kv_heads` and `d_head` are those of the recorded tensors, or the configuration's when
    no attention was asked for; `d_value` is the width of a value's heads, 0 where no value was.
    `head` rebuilds the model's logits, or is None when not asked for, or not needed and not so.
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
    *,
    hidden: Collection[int] = (),
    attention: Collection[int] = (),
    values: Collection[int] = (),
    below: Collection[int] = (),
    maps: Collection[int] = (),
    head: bool = False,
    logits: bool = False,
    max_length: int | None = None,
) -> TapReport:
    """Compare every asked tap with the model itself on one batch, and report what was found.

    Afterwards the model has our attention implementation if query, key or value were asked for,
    else the one it came with; without attention nothing of its attention is touched.

    Args:
        model: The model, on its device, in its dtype.
        inputs: A right-padded batch with `input_ids`, `attention_mask` and whatever else models
            take; the model is given the columns that it names.
        hidden: Layers whose hidden states will be tapped.
        attention: Layers whose query and key will be tapped.
        values: Layers whose value will be tapped. It is what attention is handed, and its layer is
            checked as one of `attention`.
        below: Layers whose query and key will be rebuilt from the hidden state below.
        maps: Layers whose map will be the model's own under eager attention.
        head: Whether the head's input will be tapped.
        logits: Whether logits are wanted, which may then be made of the head's input if they agree
            with the model's. If they do not, nothing is refused and the report's `head` is None.
        max_length: Longest row that will ever be run, in tokens. A row of that length is run too,
            for windows which the batch is too short to show.

    Raises:
        IncompatibleError: If a tap differs from the model, by layer, with the difference and the
            bound.
        ValueError: If the batch is not right-padded or has no row of two tokens.
    """
    anatomy = find_anatomy(model)
    heard = {*attention, *values, *below}
    anatomy.require_layers(hidden=hidden, attention={*heard, *maps})
    live = _live_positions(inputs["attention_mask"])
    if (heard or maps) and live.sum(1).max() < 2:
        raise ValueError("one token says nothing about masks; check a batch with a longer row")
    comparison = Comparison(anatomy.model_class, live, bound_of(model))
    was_training, original = model.training, model.config._attn_implementation
    model.eval()
    try:
        with torch.no_grad():
            report = _check(
                model,
                anatomy,
                model_columns(model, inputs),
                comparison,
                _Asked(
                    *(frozenset(hidden), frozenset(heard), values, below, maps),
                    *(head, logits, max_length),
                ),
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


@dataclass(frozen=True)
class _Asked:
    """What `check_taps` was asked; `heard` are all layers whose query and key are looked at."""

    hidden: frozenset[int]
    heard: frozenset[int]
    values: Collection[int]
    below: Collection[int]
    maps: Collection[int]
    head: bool
    logits: bool
    max_length: int | None


def _check(
    model: PreTrainedModel,
    anatomy: Anatomy,
    inputs: Mapping[str, Tensor],
    comparison: Comparison,
    asked: _Asked,
) -> TapReport:
    """Run the comparisons in the order of their cost; the model is in evaluation mode."""
    states, norms, logits = _reference(model, anatomy, inputs)
    modules: dict[int, nn.Module] = {}

    def remember(layer: int, call: AttentionCall) -> None:
        modules[layer] = call.module

    # First, while the model is still as it came.
    own, map_heads = (
        check_own_maps(model, inputs, asked.maps, comparison) if asked.maps else ({}, set())
    )
    with tap(
        model,
        hidden=asked.hidden | {layer - 1 for layer in asked.below},
        attention=asked.heard,
        values=asked.values,
        head=asked.head or asked.logits,
        watch=remember,
    ) as record:
        tapped = model(**inputs).logits
    _check_hidden(record, anatomy, states, norms, comparison)
    remedy = "leave attention out for this model"
    comparison.require_equal("logits under tapped attention", tapped, logits, remedy)
    spec = _found_head(model, record, logits, comparison, asked)
    rules = check_maps(model, inputs, record, modules, comparison) if modules else {}
    _check_below(model, record, asked.below, comparison)
    causal = not {"full"} & {*rules.values(), *own.values()} and _is_causal(
        model, anatomy, inputs, comparison
    )
    if not causal:
        check_padding(model, inputs, comparison)
    if rules and asked.max_length is not None:
        check_masks(model, inputs, comparison.live, rules, asked.max_length, is_causal=causal)
    found: dict[int, Rule] = {**own, **rules}
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
        rule=dict(sorted(found.items())),
        scaling=dict(sorted(record.scaling.items())),
        head=spec,
    )


def _reference(
    model: PreTrainedModel, anatomy: Anatomy, inputs: Mapping[str, Tensor]
) -> tuple[tuple[Tensor, ...], list[tuple[Tensor, Tensor]], Tensor]:
    """Run the model as it came: hidden states, what the parts beside its blocks did, and logits."""
    beside: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            beside.append((args[0], output))

    handles = [
        part.register_forward_hook(keep)
        for part in anatomy.owner.children()
        if not isinstance(part, nn.ModuleList)
    ]
    try:
        output = model(**inputs, output_hidden_states=True)
    finally:
        for handle in handles:
            handle.remove()
    states = _by_number(model, inputs, output.hidden_states or (), beside)
    return states, beside, output.logits


def _by_number(
    model: PreTrainedModel,
    inputs: Mapping[str, Tensor],
    states: tuple[Tensor, ...],
    beside: list[tuple[Tensor, Tensor]],
) -> tuple[Tensor, ...]:
    """Return a model's own states as we number them: the first block's input, then its outputs.

    Mamba leaves the input out, and gives its last state before the final norm as well as after.
    """
    if len(states) < 2 or not any(
        given is states[-2] and result is states[-1] for given, result in beside
    ):
        return states
    return (model.get_input_embeddings()(inputs["input_ids"]), *states[:-1])


def _check_hidden(
    record: Record,
    anatomy: Anatomy,
    states: tuple[Tensor, ...],
    beside: list[tuple[Tensor, Tensor]],
    comparison: Comparison,
) -> None:
    """Compare with the model's own states, whose last may stand after a norm that ours precedes."""
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
                for given, result in beside
                if result.shape == theirs.shape == given.shape
                and torch.equal(result, theirs.to(result.device))
            ]
            theirs = norms[-1] if norms else theirs
        comparison.require_equal(f"hidden layer {layer}", state, theirs, "leave this layer out")


def _found_head(
    model: PreTrainedModel,
    record: Record,
    logits: Tensor,
    comparison: Comparison,
    asked: _Asked,
) -> HeadSpec | None:
    """Return the head if it was asked for, or would save memory and is plain."""
    if asked.head:
        return _check_head(model, record, logits, comparison)
    if not asked.logits:
        return None
    try:
        return _check_head(model, record, logits, comparison)
    except torch.OutOfMemoryError:
        raise  # says nothing of the head, and which way logits are made must not hang on it
    except (IncompatibleError, RuntimeError, ValueError) as error:
        logger.info("logits are the model's own, all tokens at once: %s", error)
        return None


def _check_head(
    model: PreTrainedModel, record: Record, logits: Tensor, comparison: Comparison
) -> HeadSpec:
    """Rebuild the logits from the head's input alone."""
    spec = read_head_spec(model)
    weight, bias = head_parameters(model)
    given = record.head_input
    assert given is not None  # the tap was asked for it
    rebuilt = apply_head(given, weight.to(given), None if bias is None else bias.to(given), spec)
    remedy = "leave the head out and keep its logits in another form"
    comparison.require_equal(f"logits rebuilt with {spec}", rebuilt, logits, remedy)
    return spec


def _check_below(
    model: PreTrainedModel, record: Record, layers: Collection[int], comparison: Comparison
) -> None:
    """Rebuild query and key as a reader of the store will, here from the exact hidden state."""
    for layer in sorted(layers):
        remedy = "capture this layer's attention in form qk"
        try:
            block = QueryKeyBlock(model.config.to_dict(), layer, query_key_parameters(model, layer))
            rebuilt = block(record.hidden[layer - 1])
        except (RuntimeError, TypeError, ValueError) as error:
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
    """See whether each row's last token, hidden behind the mask or not, leaves all before it alone.

    Only asked of models that claim it: in half precision the bound alone could not tell.
    """
    lengths = comparison.live.sum(1, keepdim=True)
    position = torch.arange(comparison.live.shape[1], device=lengths.device)
    before = position < lengths - 1
    if not anatomy.is_causal or not before.any() or "attention_mask" not in inputs:
        return anatomy.is_causal
    # A row of one token keeps it: attention over nothing is undefined.
    mask = (before | (position == 0)).to(inputs["attention_mask"].dtype)
    batch = dict(inputs) | {"attention_mask": mask}
    with_mask = run_base(model, batch)
    without = run_base(model, model_inputs(batch, is_causal=True))
    return comparison.difference(without, with_mask, before) <= comparison.bound


def _sizes(record: Record, anatomy: Anatomy, map_heads: set[int]) -> tuple[int, int, int]:
    """Heads, key heads and head width, which one store keeps for all layers."""
    found = {
        (query.shape[1], record.key[layer].shape[1], query.shape[3])
        for layer, query in record.query.items()
    }
    if len(found) > 1:
        raise IncompatibleError(
            f"{anatomy.model_class} has attention layers of the shapes {sorted(found)} (heads, key "
            "heads, width), expected one; ask for layers of one shape"
        )
    sizes = found.pop() if found else (anatomy.heads, anatomy.kv_heads, anatomy.head_dim)
    if map_heads - {sizes[0]}:
        raise IncompatibleError(
            f"{anatomy.model_class} has attention maps of {sorted(map_heads)} heads, expected "
            f"{sizes[0]}; leave attention out for the layers that differ"
        )
    return sizes


def _value_width(record: Record, anatomy: Anatomy, kv_heads: int) -> int:
    """Width of a value's heads, which are as many as the keys'."""
    found = {(value.shape[1], value.shape[3]) for value in record.value.values()}
    if len(found) > 1 or any(heads != kv_heads for heads, _ in found):
        raise IncompatibleError(
            f"{anatomy.model_class} has values of the shapes {sorted(found)} (heads, width), "
            f"expected one shape of {kv_heads} heads; leave value out for the layers that differ"
        )
    return found.pop()[1] if found else 0


def _live_positions(attention_mask: Tensor) -> Bool[Tensor, "batch seq"]:
    """Turn the mask into booleans; taps and store know right padding only."""
    live = attention_mask.bool()
    if not torch.equal(live, live.cumprod(1).bool()) or not live[:, 0].all():
        raise ValueError("attention_mask has gaps, left padding or an empty row; pad on the right")
    return live
