"""One captured store an architecture, shared by the tests that only read it."""

from collections.abc import Callable

import pytest

from pipeline.tasks import models_language
from tests.captured import Captured, prepared, signal

HIDDEN = (0, 2, 3)
ATTENTION = (1, 3)


def all_signals(task: str) -> list:
    signals = [
        signal("hidden", layer, form)
        for layer in HIDDEN
        for form in ("float16", "bfloat16", "int8")
    ]
    signals += [signal("attention", layer, "qk") for layer in ATTENTION]
    signals += [signal("value", layer, "int8") for layer in ATTENTION]
    if not models_language(task):
        return [*signals, signal("logits", None, "dense")]
    return [
        *signals,
        signal("logits", None, "topk", k=8, temperatures=(1.0, 2.0)),
        signal("logits", None, "sampled", n=32),
        signal("logits", None, "head", values="int8"),
        signal("logits", None, "head", values="float16"),
    ]


@pytest.fixture(scope="session")
def captured(tmp_path_factory) -> Callable[..., Captured]:
    """Return the store of an architecture and task; made when first asked for."""
    made: dict[tuple, Captured] = {}

    def get(kind: str, task: str | None = None) -> Captured:
        if (kind, task) not in made:
            root = tmp_path_factory.mktemp(f"{kind}-{task}")
            outputs = {"multi-label": {"num_labels": 3}, "regression": {"num_labels": 1}}
            store = prepared(root, kind, task=task, **outputs.get(str(task), {}))
            store.capture(all_signals(store.task), blocks=[1, 2, 3])
            made[kind, task] = store
        return made[kind, task]

    return get


@pytest.fixture(scope="session")
def ten_segments(tmp_path_factory) -> Captured:
    """A store of ten training segments, of eight examples each, with one layer in float16."""
    lengths = {"train": [8] * 80, "validation": [8], "test": [8]}
    root = tmp_path_factory.mktemp("ten-segments")
    store = prepared(root, "llama", layers=1, rows={"lengths": lengths})
    store.capture([signal("hidden", 1, "float16")])
    return store
