"""What each choice of a planned capture takes on disk, and which students it excludes."""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cache
from typing import Any

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.planning.fitting import check_output
from pipeline.planning.planned_capture import PlannedCapture
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


MARGIN = 1.05
"""A probe predicts bytes within 5%."""


class Budget:
    """Compares the choices of one planned capture with a number of bytes."""

    def __init__(self, planned: PlannedCapture) -> None:
        self.planned = planned
        self.students = planned.project.students
        self._signal_bytes = cache(self._bytes_of_signal)

    def describe(self, budget: int) -> dict[str, Any]:
        """Return all choices, whether each fits, and the students that it excludes, as JSON."""
        requested = self.planned.signals
        trainable = {name for name in self.students if self._reason(name, requested) is None}
        offered = choices(requested, self._used_layers(trainable), self._temperatures())
        described = []
        for choice in offered:
            reasons = {name: self._reason(name, choice.signals) for name in sorted(trainable)}
            size = self._bytes(choice.signals)
            if size is None:
                continue
            described.append(
                {
                    "kind": choice.kind,
                    "change": choice.change,
                    "bytes": size,
                    "fits": size <= budget,
                    "excludes": {name: reason for name, reason in reasons.items() if reason},
                }
            )
        return {
            "budget_bytes": budget,
            "is_measured": self.planned.probe is not None,
            "choices": described,
        }

    def _bytes(self, signals: Sequence[Signal]) -> int | None:
        """Return the most that a capture takes; None if this teacher cannot have such signals."""
        planned = self.planned
        try:
            sizes = sum(self._signal_bytes(signal) for signal in signals)
        except IncompatibleError:  # more ids than the teacher's vocabulary has
            return None
        stored_once = planned.asset_bytes(list(signals), planned.blocks)
        return sizes + sum(stored_once.values()) + planned.tables_bytes

    def _bytes_of_signal(self, signal: Signal) -> int:
        estimate = self.planned.estimate(signal)
        if estimate.is_measured:
            return min(estimate.most_bytes, round(MARGIN * estimate.expected_bytes))
        # Without a measurement of this teacher, count as if nothing compressed.
        return estimate.most_bytes

    def _used_layers(self, trainable: set[str]) -> dict[str, set[int]]:
        """Return, by kind, the layers that some student uses."""
        by_name = {signal.name: signal for signal in self.planned.signals}
        used: dict[str, set[int]] = {}
        for name in trainable:
            for selected in self.planned.rehearse(name, self.planned.signals)["signals"]:
                signal = by_name[selected]
                if signal.layer is not None:
                    used.setdefault(signal.kind, set()).add(signal.layer)
        return used

    def _temperatures(self) -> list[float]:
        terms = [student.loss.output for student in self.students.values()]
        return sorted({term.temperature for term in terms if not term.weight.is_off})

    def _reason(self, name: str, signals: Sequence[Signal]) -> str | None:
        """Return why a student could not be trained from these signals; None if it could."""
        try:
            self.planned.rehearse(name, list(signals))
            for signal in signals:
                if signal.kind == "logits":
                    check_output(name, self.students[name], signal.form, self.planned.task)
        except (ConfigError, IncompatibleError) as error:
            return str(error)
        return None
