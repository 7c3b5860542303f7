"""Other ways to capture a teacher, for a user who has less disk than the capture would take.

A choice changes one kind of signal: its form, its layers, or whether it is captured at all.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from pipeline.store.forms.form import Form
from pipeline.store.forms.registry import forms_of
from pipeline.store.signals import Signal


@dataclass(frozen=True)
class Choice:
    """One way to capture.

    Attributes:
        kind: The kind of signal that differs from the parameters; empty for the capture as they
            describe it.
        change: What differs, in words.
        signals: All signals that would be captured.
    """

    kind: str
    change: str
    signals: tuple[Signal, ...]


def choices(
    signals: Sequence[Signal],
    used_layers: Mapping[str, Set[int]],
    temperatures: Sequence[float],
) -> list[Choice]:
    """Return the capture as requested, then each change of one kind of its signals.

    Args:
        signals: What the parameters request.
        used_layers: For each kind, the layers that some student uses.
        temperatures: The temperatures of the students' output losses.
    """
    found = [Choice("", "as in params.yaml", tuple(signals))]
    for kind in dict.fromkeys(signal.kind for signal in signals):
        current = [signal for signal in signals if signal.kind == kind]
        others = [signal for signal in signals if signal.kind != kind]

        def add(
            change: str,
            replaced: Sequence[Signal],
            kind: str = kind,
            current: Sequence[Signal] = current,
            others: Sequence[Signal] = others,
        ) -> None:
            if set(replaced) != set(current) and _is_complete([*replaced, *others]):
                found.append(Choice(kind, change, (*replaced, *others)))

        layers = list(dict.fromkeys(signal.layer for signal in current))
        for form in _variants(current[0].form, temperatures):
            add(f"form {_describe(form)}", [Signal(form, layer) for layer in layers])
        used = used_layers.get(kind, set())
        kept = [signal for signal in current if signal.layer in used]
        if kept:
            numbers = ", ".join(str(layer) for layer in sorted(used))
            add(f"only layers {numbers}, which students use", kept)
        add("left out", [])
    return found


def _variants(form: Form, temperatures: Sequence[float]) -> list[Form]:
    """Return forms of the same kind for the same sort of rows, the most faithful first."""
    return [
        variant
        for known in forms_of(form.kind).values()
        if known.axis is form.axis
        for variant in known.variants(tuple(temperatures) or (1.0,))
    ]


def _describe(form: Form) -> str:
    options = {name: value for name, value in vars(form).items() if not isinstance(value, tuple)}
    shown = ", ".join(f"{name} {value}" for name, value in options.items())
    return f"{form.name} ({shown})" if shown else form.name


def _is_complete(signals: Sequence[Signal]) -> bool:
    """Tell whether every signal has the other signals that decoding it needs."""
    captured = {(signal.kind, signal.layer) for signal in signals}
    return all(need in captured for signal in signals for need in signal.needs.items())
