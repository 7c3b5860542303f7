"""The arms of the sweep over forms: what a student learns from, and nothing else changes.

Every arm but the first two differs from `dense` in one thing, so that what it costs the student is
that thing's. Dense is hidden states in float16, attention rebuilt from the float16 state below (a
KL of 1e-7 from the teacher's own maps), and logits as the head's input in float16.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.provenance import canonical_json
from pipeline.store.forms.registry import build_form
from pipeline.store.signals import Signal
from pipeline.student.align.layer_maps import Layers, layer_map, layer_pairs
from pipeline.student.align.objective import Alignment, Objective
from pipeline.tasks import models_language

Spec = tuple[str, Mapping[str, Any]]
"""A form and its options."""


@dataclass(frozen=True)
class Arm:
    """What one student learns from.

    Attributes:
        name: The arm's name.
        about: What is asked of it: `forms`, `hidden`, `attention`, `logits` or `layers`.
        hidden: Form of the hidden states of the feature term.
        attention: Form of the attention.
        below: Form of the hidden states that attention `below` is rebuilt from.
        logits: Form of a language model's logits; other tasks keep theirs dense.
        layers: Student layer to teacher layer; None for the student's own map.
        without: Terms of the loss that are off.
    """

    name: str
    about: str = "forms"
    hidden: Spec = ("float16", {})
    attention: Spec = ("below", {})
    below: Spec = ("float16", {})
    logits: Spec = ("head", {"values": "float16"})
    layers: Mapping[int, int] | None = None
    without: tuple[str, ...] = ()

    def objective(self, whole: Objective) -> Objective:
        """Return the student's objective, with the arm's forms and terms."""
        off = {term: {"weight": 0.0} for term in self.without}
        named: dict[str, dict[str, Any]] = {
            "feature": {"form": self.hidden[0]},
            "attention": {"form": self.attention[0]},
        }
        terms = whole.model_dump(mode="json")
        for term, values in (*named.items(), *off.items()):
            terms[term] |= values
        return Objective.model_validate_json(canonical_json(terms))

    def alignment(self, align: Alignment) -> Alignment:
        """Return the student's alignment, or the arm's layers."""
        if self.layers is None:
            return align
        return align.model_copy(update={"layers": dict(self.layers)})

    def signals(
        self, align: Alignment, *, student_layers: int, teacher_layers: int, task: str
    ) -> list[Signal]:
        """Return what the teacher must be captured as for this arm, each signal once."""
        align = self.alignment(align)
        layers = Layers(student_layers, teacher_layers, align.embeddings)
        pairs = layer_pairs(layer_map(align.layers, layers))
        hidden, attention = build_form("hidden", *_plain(self.hidden)), self.attention
        found: list[Signal] = []
        if "feature" not in self.without:
            followed = sorted({teacher for _, teacher in pairs})
            found += [Signal(hidden, layer) for layer in followed]
        if "attention" not in self.without:
            form = build_form("attention", *_plain(attention))
            attended = sorted({teacher for student, teacher in pairs if student and teacher})
            there = {signal.layer for signal in found}
            if form.name == "below":
                inner = build_form("hidden", *_plain(self.below))
                found += [Signal(inner, layer - 1) for layer in attended if layer - 1 not in there]
            found += [Signal(form, layer) for layer in attended]
        if "output" not in self.without:
            logits = self.logits if models_language(task) else ("dense", {})
            found.append(Signal(build_form("logits", *_plain(logits)), None))
        return found


def _plain(spec: Spec) -> tuple[str, dict[str, Any]]:
    return spec[0], dict(spec[1])


DENSE = Arm("dense")


def arms(*, task: str, student_layers: int, teacher_layers: int) -> list[Arm]:
    """Return all arms for a task, those that matter most first; `dense` is the first."""
    int8: Spec = ("int8", {})
    qk: Spec = ("qk", {})
    language = models_language(task)
    head8: Spec = ("head", {"values": "int8"})
    found = [
        DENSE,
        Arm("int8 + qk", hidden=int8, attention=qk, logits=head8),
        Arm("hidden int8", "hidden", hidden=int8),
        Arm("hidden int4", "hidden", hidden=("int4", {})),
        Arm("attention qk", "attention", attention=qk),
        Arm("no features", without=("feature",)),
        Arm("no features, no attention", without=("feature", "attention")),
    ]
    if language:
        found += [
            Arm("logits head int8", "logits", logits=head8),
            Arm("logits topk 64", "logits", logits=("topk", {"k": 64})),
            Arm("logits topk 16", "logits", logits=("topk", {"k": 16})),
            Arm("logits sampled 64", "logits", logits=("sampled", {"n": 64})),
        ]
    found += [
        Arm("hidden bfloat16", "hidden", hidden=("bfloat16", {})),
        Arm("hidden int4 in groups of 16", "hidden", hidden=("int4", {"group": 16})),
        Arm("attention map", "attention", attention=("map", {})),
        Arm("attention below int8", "attention", below=int8),
        Arm("attention below int4", "attention", below=("int4", {})),
    ]
    if language:
        found += [
            Arm("logits topk 256", "logits", logits=("topk", {"k": 256})),
            Arm("logits sampled 16", "logits", logits=("sampled", {"n": 16})),
        ]
    return found + layer_arms(student_layers, teacher_layers)


def layer_arms(student_layers: int, teacher_layers: int) -> list[Arm]:
    """Return arms that differ in layers alone, all in the dense forms."""
    students = range(1, student_layers + 1)
    lift = teacher_layers - student_layers
    return [
        Arm("layers: last", "layers", layers={student_layers: teacher_layers}),
        Arm("layers: lowest", "layers", layers={student: student for student in students}),
        Arm("layers: highest", "layers", layers={student: student + lift for student in students}),
        Arm("no attention", without=("attention",)),
    ]
