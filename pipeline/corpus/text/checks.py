"""Checks that a source and its examples suit the task, before anything is written.

A parameter of another task is an error, because it would otherwise be ignored silently.
"""

import math
from collections.abc import Mapping

from pipeline.corpus.sources.base import SourceConfig
from pipeline.corpus.sources.columns import ColumnSource
from pipeline.corpus.text.examples import Example, Split
from pipeline.corpus.text.splits import NO_LABEL
from pipeline.errors import ConfigError
from pipeline.tasks import Task

WITH_CLASSES = frozenset({"classification", "multi-label"})
KEYS = ("text", "pair", "label", "labels", "separator", "target", "alternatives", "messages")
"""Keys of a source that say which column is what."""
NEEDED: dict[Task, tuple[str, ...]] = {
    "causal-lm": (),
    "prompt-target": ("target",),
    "messages": ("messages",),
    "classification": ("label",),
    "multi-label": ("labels",),
    "regression": ("label",),
}
ALLOWED: dict[Task, tuple[str, ...]] = {
    # A causal language model's labels are its own tokens: a label column plays no part.
    "causal-lm": ("text", "label"),
    "prompt-target": ("text", "pair", "target", "alternatives"),
    "messages": ("messages",),
    "classification": ("text", "pair", "label"),
    "multi-label": ("text", "pair", "labels", "separator"),
    "regression": ("text", "pair", "label"),
}
ANSWERS: dict[Task, str] = {
    "causal-lm": "single texts",
    "prompt-target": "targets",
    "messages": "messages",
    "classification": "labels",
    "multi-label": "labels",
    "regression": "labels",
}
LARGEST = 3.4028234663852886e38
"""Largest regression label: labels are stored in float32."""
SUITABLE = {
    "text": "causal-lm",
    "pair": "prompt-target, classification, multi-label or regression",
    "label": "classification or regression",
    "labels": "multi-label",
    "separator": "multi-label",
    "target": "prompt-target",
    "alternatives": "prompt-target",
    "messages": "messages",
}


def check_task(source: SourceConfig, task: Task, classes: list[str] | None) -> None:
    """Refuse a source or classes that do not suit the task.

    Raises:
        ConfigError: If a key is missing or the task does not use it; names the key.
    """
    kind = str(getattr(source, "kind", "?"))
    if isinstance(source, ColumnSource):
        given = {key for key in KEYS if key in source.model_fields_set and getattr(source, key)}
        for key in NEEDED[task]:
            if key not in given:
                raise ConfigError(
                    f"corpus.source.{key}: missing; task {task} needs it and this source {kind} "
                    "names none: add the column's name, or correct the task"
                )
        for key in KEYS:
            if key in given and key not in ALLOWED[task]:
                says = "makes pairs of texts, " if key == "pair" else ""
                raise ConfigError(
                    f"corpus.source.{key}: {getattr(source, key)!r} {says}which task {task} does "
                    f"not use; remove it, or use task {SUITABLE[key]}"
                )
    elif task not in source.tasks:
        raise ConfigError(
            f"corpus.task: {task} needs {ANSWERS[task]} and the source {kind} names none; use a "
            f"table source with such columns, or task {' or '.join(source.tasks)}"
        )
    if classes is None:
        return
    if task not in WITH_CLASSES:
        raise ConfigError(
            f"corpus.classes: {len(classes)} classes for task {task}, expected none; remove it"
        )
    if len(set(classes)) != len(classes) or len(classes) < 2:
        raise ConfigError(
            f"corpus.classes: found {classes}, expected two or more different names; correct it"
        )


def classes_of(task: Task, train: list[Example]) -> tuple[str, ...]:
    """Return the classes of the training split, sorted; by number if all names are integers.

    Raises:
        ConfigError: If a row has no answer, or there are fewer than two classes.
    """
    refuse_unanswered(task, "train", train)
    classes = {name for example in train for name in _names(task, example)}
    if len(classes) < 2:
        key = "labels" if task == "multi-label" else "label"
        have = f"the single class {classes.pop()!r}" if classes else "no class"
        raise ConfigError(
            f"corpus.source.{key}: the training split has {have}, "
            "expected two or more; check the column"
        )
    try:
        return tuple(sorted(classes, key=lambda name: (int(name), name)))
    except ValueError:
        return tuple(sorted(classes))


def _names(task: Task, example: Example) -> tuple[str, ...]:
    return (example.labels or ()) if task == "multi-label" else (example.label or "",)


def refuse_unanswered(task: Task, split: Split, examples: list[Example]) -> None:
    """Refuse an example without a label.

    Raises:
        ConfigError: If there is one; names the example.
    """
    for example in examples:
        if example.labels is None if task == "multi-label" else not example.label:
            what = "number" if task == "regression" else "class"
            raise ConfigError(
                f"{example.source}: no label in a {split} row, expected a {what}; "
                "label the row or remove it"
            )


def check_labels(
    task: Task, splits: Mapping[Split, list[Example]], classes: tuple[str, ...]
) -> None:
    """Refuse a label that is not one of the classes or, in a regression, not a finite number.

    Raises:
        ConfigError: If there is one, or a label is missing; names the example and its label.
    """
    expected = set(classes)
    for split, examples in splits.items():
        refuse_unanswered(task, split, examples)
        for example in examples:
            if task == "regression":
                _refuse_no_number(example, split)
                continue
            for name in _names(task, example):
                if name not in expected:
                    marks = " (which marks a row without answer)" if name in NO_LABEL else ""
                    raise ConfigError(
                        f"{example.source}: label {name!r}{marks} in a {split} row, expected "
                        f"one of {', '.join(map(repr, classes))}; correct the row or "
                        "corpus.classes"
                    )


def _refuse_no_number(example: Example, split: Split) -> None:
    try:
        number = float(example.label or "")
    except ValueError:
        number = math.nan
    if not abs(number) <= LARGEST:
        raise ConfigError(
            f"{example.source}: label {example.label!r} in a {split} row, expected a finite "
            "number of float32; correct the row, or use task classification"
        )
