"""What of a planned capture fits into a budget, and which students could not be trained of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.store.forms.form import Content, Form
from pipeline.store.signals import Signal
from pipeline.tasks import models_language
from pipeline.teacher.capture.request import resolve_layers
from stages.planning.capture import PlannedCapture

if TYPE_CHECKING:
    from pipeline.planning.budget import Choice, Needs, Request

MARGIN = 1.05
"""A probe tells bytes within 5%."""


class Budget:
    """Chooses for one planned capture."""

    def __init__(self, planned: PlannedCapture) -> None:
        self.planned = planned
        self.project = planned.project

    def choose(self, budget: int) -> tuple["Choice", dict[str, str]]:
        """Return the best that fits, and why students could not be trained of it."""
        from pipeline.planning.budget import choose

        sizes: dict[str, int] = {}

        def size(signals: Sequence[Signal]) -> int:
            for signal in signals:
                if signal.name not in sizes:
                    sizes[signal.name] = self._size(signal)
            return sum(sizes[signal.name] for signal in signals)

        blocks = sum(self.planned.asset_bytes([], self.planned.blocks).values())
        choice = choose(
            self._requests(),
            budget,
            size=size,
            fixed=self.planned.tables_bytes + blocks,
            needs=self._needs(),
            accepts=self._refusing,
        )
        return choice, self._broken(choice.signals())

    def _size(self, signal: Signal) -> int:
        """Return what a signal takes at most, with what is stored once for it."""
        planned, one = self.planned, self.planned.estimate(signal)
        once = sum(planned.asset_bytes([signal], []).values())
        if one.is_measured:
            return once + min(one.most_bytes, round(MARGIN * one.expected_bytes))
        # What nobody has measured of this teacher counts as if nothing compressed.
        return once + one.most_bytes

    def _requests(self) -> "dict[str, list[Request]]":
        from pipeline.planning.budget import Request

        found: dict[str, list[Request]] = {"hidden": [], "attention": [], "value": [], "logits": []}
        for one in self.project.capture.requests():
            first = 0 if one.kind == "hidden" else 1
            key = f"{self.project.key}.{one.kind}.layers"
            layers = resolve_layers(one.layers, first=first, depth=self.planned.depth, key=key)
            found[one.kind].append(Request(one.kind, one.form, tuple(layers)))
        form = self.project.capture.logits_form()
        if form is not None:
            found["logits"].append(Request("logits", form))
        return found

    def _needs(self) -> "list[Needs]":
        """Return what students select of what is asked for; none of one that could not."""
        from pipeline.planning.budget import Needs

        by_name = {signal.name: signal for signal in self.planned.signals}
        found = []
        for name, student in self.project.students.items():
            try:
                selected = self.planned.rehearse(name, self.planned.signals)["signals"]
            except (ConfigError, IncompatibleError):
                continue
            layers: dict[str, frozenset[int]] = {}
            for signal in map(by_name.__getitem__, selected):
                if signal.layer is not None:
                    layers[signal.kind] = layers.get(signal.kind, frozenset()) | {signal.layer}
            loss = student.loss
            named = {"hidden": loss.feature.form, "attention": loss.attention.form}
            temperature = None if loss.output.weight.is_off else loss.output.temperature
            forms = {kind: form for kind, form in named.items() if form is not None}
            found.append(Needs(name, layers, forms, temperature))
        return found

    def _refusing(self, form: Form) -> frozenset[str]:
        """Return the students whose output term cannot use logits of a form."""
        from pipeline.student.align.output_checks import check_output_loss, temperature_index

        declared = Signal(form, None)
        found = set()
        for name, student in self.project.students.items():
            term = student.loss.output
            if term.weight.is_off:
                continue
            try:
                check_output_loss(declared, term)
                temperature_index(declared, term.temperature)
            except IncompatibleError:
                found.add(name)
            is_cut = student.model.vocabulary == "corpus" and models_language(self.planned.task)
            if (is_cut and form.content is not Content.LOGITS) or term.form not in (
                None,
                form.name,
            ):
                found.add(name)
        return frozenset(found)

    def _broken(self, signals: list[Signal]) -> dict[str, str]:
        """Return, by student that could be trained of all, why it could not be of these."""
        found: dict[str, str] = {}
        for needs in self._needs():
            try:
                self.planned.rehearse(needs.student, signals)
            except (ConfigError, IncompatibleError) as error:
                found[needs.student] = str(error)
        for signal in signals:
            if signal.kind == "logits":
                for name in sorted(self._refusing(signal.form)):
                    found.setdefault(name, f"its output term cannot use {signal.form.name}")
        return found

    def describe(
        self, choice: "Choice", broken: dict[str, str], budget: int, is_applied: bool
    ) -> dict[str, Any]:
        """Return a choice as JSON values."""
        return {
            "budget_bytes": budget,
            "bytes": choice.bytes,
            "how": "at most" if self.planned.probe is None else "at most, by the probe,",
            "penalty": choice.penalty,
            "given_up": choice.given_up,
            "breaks": broken,
            "capture": {
                kind: [{"form": one.form.name, "layers": list(one.layers)} for one in rung.requests]
                for kind, rung in choice.rungs.items()
            },
            "applied": is_applied,
        }
