"""Resolve a capture's requested layers and forms to signals, without torch or the teacher."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pipeline.axes import SPLITS, TRAIN, Axis
from pipeline.errors import ConfigError
from pipeline.store.forms.form import Form
from pipeline.store.forms.registry import names_of
from pipeline.store.signals import Signal
from pipeline.tasks import models_language

Layers: TypeAlias = Literal["all"] | Sequence[int] | dict[Literal["every"], int]
"""A list of layers, `all`, or `{every: n}`: every n-th layer, counted back from the last."""


@dataclass(frozen=True)
class LayerRequest:
    """A form of hidden states, attention or values, and the layers to capture in it."""

    form: Form
    layers: Layers

    @property
    def kind(self) -> str:
        """The kind of feature."""
        return self.form.kind


def resolve_layers(layers: Layers, *, first: int, depth: int, key: str) -> list[int]:
    """Return layer numbers in order.

    Args:
        layers: The value of the parameter.
        first: 0 for hidden states (the input of block 0), 1 for attention.
        depth: Number of the teacher's blocks.
        key: The parameter's name, for the error.

    Raises:
        ConfigError: If the list is empty, repeats a layer, or has one that does not exist.
    """
    if layers == "all":
        return list(range(first, depth + 1))
    if isinstance(layers, dict):
        return sorted(range(depth, first - 1, -layers["every"]))
    numbers = [int(layer) for layer in layers]
    if not numbers or len(set(numbers)) < len(numbers):
        raise ConfigError(f"{key}: {numbers} is empty or repeats a layer; expected each layer once")
    for layer in numbers:
        if not first <= layer <= depth:
            raise ConfigError(
                f"{key}: layer {layer} asked for, the teacher has {first} to {depth}; remove it"
            )
    return sorted(numbers)


def resolve_signals(
    requests: Sequence[LayerRequest], logits: Form | None, *, depth: int, task: str, key: str
) -> list[Signal]:
    """Return the requested signals: hidden states, then attention, values and logits.

    Raises:
        ConfigError: If the teacher does not have a layer, the logits' form does not fit the task,
            or attention would be rebuilt from a hidden state that is not requested.
    """
    signals = []
    for request in requests:
        first = 0 if request.kind == "hidden" else 1
        numbers = resolve_layers(
            request.layers, first=first, depth=depth, key=f"{key}.{request.kind}.layers"
        )
        signals += [Signal(request.form, layer) for layer in numbers]
    if logits is not None:
        axis = Axis.TOKEN if models_language(task) else Axis.EXAMPLE
        if logits.axis is not axis:
            raise ConfigError(
                f"{key}.logits.form: {logits.name} does not fit the task {task}; use "
                f"{names_of(kind='logits', axis=axis)}"
            )
        signals.append(Signal(logits, None))
    captured = {(signal.kind, signal.layer) for signal in signals}
    for signal in signals:
        for needed in signal.needs.items():
            if needed not in captured:
                kind, layer = needed
                raise ConfigError(
                    f"{key}.{signal.kind}: form {signal.form.name} of layer {signal.layer} is "
                    f"rebuilt from {kind} layer {layer}, which is not captured; add {layer} to "
                    f"{key}.{kind}.layers"
                )
    return list({signal.name: signal for signal in signals}.values())


def splits_of(signal: Signal) -> tuple[str, ...]:
    """Return the splits to capture a signal for: logits for all, since evaluation uses them too."""
    return SPLITS if signal.kind == "logits" else (TRAIN,)
