"""Record hidden states, query, key and value during a model's ordinary forward pass.

Hidden states come from module hooks. Query, key and value come from an attention function that is
registered with transformers: it is SDPA, but first passes query (after rotary embedding), key and
value (before head repetition) to the tap of the calling module. Recorded tensors are part of the
model's autograd graph, so gradients flow through them.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from pipeline.errors import IncompatibleError
from pipeline.taps.anatomy import find_anatomy

IMPLEMENTATION = "decant_tap"
"""Name under which our attention function is registered with transformers."""

SCORE_CHANGERS = {
    "softcap": "a soft cap",
    "s_aux": "attention sinks",
    "position_bias": "a position bias",
}
"""Attention arguments that change scores beyond scaling and mask; SDPA silently ignores some."""

REMEDY = (
    "leave attention out for this model (hidden states and logits can be tapped, and a teacher's "
    "own attention maps be captured with `form: map`)"
)
"""Advice where attention does not follow from query and key alone."""


@dataclass
class Record:
    """The tensors of the latest forward pass, by layer; each pass replaces them."""

    hidden: dict[int, Float[Tensor, "batch seq d"]] = field(default_factory=dict)
    query: dict[int, Float[Tensor, "batch heads seq d_head"]] = field(default_factory=dict)
    key: dict[int, Float[Tensor, "batch kv_heads seq d_head"]] = field(default_factory=dict)
    value: dict[int, Float[Tensor, "batch kv_heads seq d_value"]] = field(default_factory=dict)
    scaling: dict[int, float] = field(default_factory=dict)
    head_input: Float[Tensor, "batch seq d"] | None = None


@dataclass(frozen=True)
class AttentionCall:
    """One call of the attention function: the calling module and its mask."""

    module: nn.Module
    mask: Tensor | None


Watch = Callable[[int, AttentionCall], None]


def prepare_attention(model: PreTrainedModel) -> None:
    """Make `model` compute attention through our function, with the same results as SDPA.

    Raises:
        IncompatibleError: If the model does not use transformers' AttentionInterface.
    """
    if model.config._attn_implementation == IMPLEMENTATION:
        return
    # Check first: where it cannot set one, transformers only logs a warning and changes nothing.
    if model._can_set_attn_implementation():
        model.set_attn_implementation(IMPLEMENTATION)
    if model.config._attn_implementation != IMPLEMENTATION:
        raise IncompatibleError(
            f"{type(model).__name__} computes attention outside transformers' AttentionInterface, "
            f"expected a model that uses it; {REMEDY}"
        )


@contextmanager
def tap(
    model: PreTrainedModel,
    *,
    hidden: Collection[int] = (),
    attention: Collection[int] = (),
    values: Collection[int] = (),
    head: bool = False,
    watch: Watch | None = None,
) -> Iterator[Record]:
    """Record the requested layers in each forward pass of `model` or of its base model.

    Gradient checkpointing's recomputation in the backward pass is not recorded again. Different
    models can be tapped in different threads; a model can have one tap at a time. Tapping
    attention leaves the model with our attention implementation.

    Args:
        model: The model; gradient checkpointing must be non-reentrant.
        hidden: Layers 0..L; 0 is the input of the first block, L the raw output of the last, before
            any final norm.
        attention: Layers 1..L whose query, key and scaling to record.
        values: Layers 1..L whose value to record, the tensor that attention averages.
        head: Record the input of the head, which is the base model's output, even if no logits are
            computed.
        watch: Called with each tapped layer's attention call, for checks.

    Raises:
        IncompatibleError: If a layer does not exist, or the model computes attention outside
            transformers' AttentionInterface.
    """
    anatomy = find_anatomy(model)
    anatomy.require_layers(hidden=hidden, attention={*attention, *values})
    if attention or values:
        prepare_attention(model)
    record = Record()
    recorder = _Recorder(
        *(anatomy.model_class, record, frozenset(hidden), frozenset(attention), frozenset(values)),
        *(head, watch),
    )
    # Hook the module that holds the blocks: some models with a head (OPT) call it directly.
    handles = [
        anatomy.owner.register_forward_pre_hook(recorder.begin),
        anatomy.owner.register_forward_hook(recorder.end, always_call=True),
        anatomy.base.register_forward_hook(recorder.end_of_base),
    ]
    if 0 in hidden:
        handles.append(
            anatomy.blocks[0].register_forward_pre_hook(recorder.block_input, with_kwargs=True)
        )
    handles += [
        anatomy.blocks[layer - 1].register_forward_hook(recorder.block_output(layer))
        for layer in set(hidden) - {0}
    ]
    listeners = [
        (module, _Listener(recorder, layer))
        for layer in {*attention, *values}
        for module in anatomy.blocks[layer - 1].modules()
    ]
    try:
        for module, listener in listeners:
            if module in _LISTENERS:
                raise RuntimeError(f"{anatomy.model_class} is tapped already; end that tap first")
            _LISTENERS[module] = listener
        yield record
    finally:
        for handle in handles:
            handle.remove()
        for module, listener in listeners:
            if _LISTENERS.get(module) is listener:
                del _LISTENERS[module]


@dataclass(eq=False)
class _Recorder:
    """State of one tap: what to record, where, and whether a forward pass is running."""

    model_class: str
    record: Record
    hidden: frozenset[int]
    attention: frozenset[int]
    values: frozenset[int]
    head: bool
    watch: Watch | None
    is_open: bool = False
    has_gradients: bool = False
    versions: dict[int, int] = field(default_factory=dict)

    def begin(self, module: nn.Module, args: Any) -> None:
        self.record.hidden, self.record.query, self.record.key = {}, {}, {}
        self.record.value, self.record.scaling, self.record.head_input = {}, {}, None
        self.versions = {}
        self.is_open, self.has_gradients = True, torch.is_grad_enabled()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.is_open = False
        if output is None:  # the pass failed and its error is propagating
            return
        if self.head:
            self.record.head_input = _first(output)
        missing = sorted(
            (self.attention - self.record.query.keys()) | (self.values - self.record.value.keys())
        )
        if missing:
            raise IncompatibleError(
                f"{self.model_class}: layers {missing} computed attention outside transformers' "
                f"AttentionInterface, expected one call a layer; {REMEDY}"
            )
        if silent := sorted(self.hidden - self.record.hidden.keys()):
            raise IncompatibleError(
                f"{self.model_class} runs blocks without calling their hooks (layers {silent}), "
                "expected blocks called as modules; leave hidden states out for this model"
            )
        for layer, version in self.versions.items():
            if self.record.hidden[layer]._version != version:
                raise IncompatibleError(
                    f"{self.model_class} changes hidden layer {layer} in place after its block, "
                    "expected it to stay unchanged; leave that layer out"
                )

    def end_of_base(self, module: nn.Module, args: Any, output: Any) -> None:
        """Record the head's input where the base model has more modules after its blocks."""
        if self.head:
            self.record.head_input = _first(output)

    def block_input(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.keep(0, args[0] if args else kwargs["hidden_states"])

    def block_output(self, layer: int) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, args, output: self.keep(layer, _first(output))

    def keep(self, layer: int, state: Tensor) -> None:
        if self.is_open:
            self.record.hidden[layer] = state
            if not state.is_inference():  # inference tensors carry no version
                self.versions[layer] = state._version


@dataclass(frozen=True)
class _Listener:
    """Connects an attention module to its tap and its layer number."""

    recorder: _Recorder
    layer: int

    def hear(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        window: int | None,
    ) -> None:
        recorder, layer = self.recorder, self.layer
        if not recorder.is_open:
            return
        where = f"{recorder.model_class} layer {layer}"
        if layer in recorder.record.query or layer in recorder.record.value:
            raise IncompatibleError(
                f"{where} computes attention twice (cross-attention?), expected once; leave "
                "attention and value out for this layer"
            )
        if recorder.has_gradients and not torch.is_grad_enabled():
            raise IncompatibleError(
                f"{where} runs under reentrant gradient checkpointing, whose recorded tensors have "
                'no gradient; expected non-reentrant, checkpoint with {"use_reentrant": False}'
            )
        if layer in recorder.values:
            recorder.record.value[layer] = value
        if layer not in recorder.attention:
            return
        if window is not None and key.shape[2] > window:
            raise IncompatibleError(
                f"{where} attends through a sliding window of {window} tokens, found a row of "
                f"{key.shape[2]}; leave attention out for this layer, tokenize with max_length "
                "within the window, or capture a teacher's own attention maps with `form: map`"
            )
        recorder.record.query[layer], recorder.record.key[layer] = query, key
        recorder.record.scaling[layer] = (
            query.shape[-1] ** -0.5 if scaling is None else float(scaling)
        )
        if recorder.watch is not None:
            recorder.watch(layer, AttentionCall(module, mask))


_LISTENERS: WeakKeyDictionary[nn.Module, _Listener] = WeakKeyDictionary()


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """SDPA that first passes its inputs to the module's tap; refuses what SDPA would ignore."""
    for argument, what in SCORE_CHANGERS.items():
        if kwargs.get(argument) is not None:
            number = getattr(module, "layer_idx", None)
            name = type(module).__name__ + ("" if number is None else f" (layer {number + 1})")
            raise IncompatibleError(
                f"{name} uses {what}, expected softmax of scaled query-key products and a mask; "
                f"{REMEDY}"
            )
    listener = _LISTENERS.get(module)
    if listener is not None:
        listener.hear(
            module, query, key, value, attention_mask, scaling, kwargs.get("sliding_window")
        )
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scaling, **kwargs
    )


def _first(output: Any) -> Tensor:
    """Return the hidden state of a module's output: a tensor, or the first item of a sequence."""
    return output if isinstance(output, Tensor) else output[0]


AttentionInterface.register(IMPLEMENTATION, _attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
