"""What runs on the pretended GPU and on a real one: stores with every form, and every term."""

from pathlib import Path
from typing import Any

from pipeline.student.align.needs import select_signals
from pipeline.student.align.objective import Alignment, Objective
from pipeline.student.loop.train import StudentRun
from pipeline.student.model.origin import StudentModel
from tests.captured import Captured, signal
from tests.student.runs import training_of

LAYERS = [
    signal("hidden", 0, "float16"),
    signal("hidden", 1, "int8"),
    signal("hidden", 2, "fp8"),
    signal("hidden", 3, "bfloat16"),
    signal("attention", 1, "qk"),
    signal("attention", 2, "below"),
    signal("attention", 3, "map"),
    signal("value", 1, "int8"),
]
LOGITS = [
    signal("logits", None, "head"),
    signal("logits", None, "topk", k=8),
    signal("logits", None, "sampled", n=4),
]
SIGNALS = {
    "llama": LAYERS + LOGITS,
    "gpt2": LAYERS + LOGITS,
    "bert": [*LAYERS, signal("logits", None, "dense")],
}
"""By family of the teacher."""

ON = {"weight": 1.0}
TERMS: dict[str, dict[str, Any]] = {
    "int8": {"feature": ON | {"form": "int8"}},
    "fp8": {"feature": ON | {"form": "fp8"}},
    "bfloat16": {"feature": ON | {"form": "bfloat16", "skip_first_token": True}},
    "qk": {"attention": ON | {"form": "qk"}},
    "map": {"attention": ON | {"form": "map", "loss": "head_mean"}},
    "below": {"attention": ON | {"form": "below"}},
    "relations": {"attention": ON | {"form": "qk", "loss": "relations"}},
    "head": {"output": ON | {"form": "head", "loss": "jsd"}},
    "topk": {"output": ON | {"form": "topk"}},
    "sampled": {"output": ON | {"form": "sampled"}},
    "dense": {"output": ON | {"form": "dense"}},
    "labels": {"labels": ON},
}
LAYER = {"fp8": 2, "bfloat16": 3, "map": 3, "below": 2}
"""The layer that a term compares; 1 where none is named."""
CASES = [
    (kind, term)
    for kind in SIGNALS
    for term in TERMS
    if term not in (("head", "topk", "sampled") if kind == "bert" else ("dense",))
]
"""Families with the terms that their task has."""


def run_of(kind: str, captured: Captured, term: str, root: Path, **changes: Any) -> StudentRun:
    """A student of three layers with one term, not trained yet."""
    goal, layer = Objective.model_validate(TERMS[term]), LAYER.get(term, 1)
    depth = {"n_layer": 3} if kind == "gpt2" else {"num_hidden_layers": 3}
    model = StudentModel(architecture=depth)
    selected = select_signals(
        captured.manifests(SIGNALS[kind]),
        name="tiny",
        objective=goal,
        align=Alignment(layers={layer: layer}),
        model=model,
    )
    return StudentRun(
        training_of(captured, root, objective=goal, model=model, selected=selected, **changes)
    )
