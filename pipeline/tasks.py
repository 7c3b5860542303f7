"""The tasks, written down once: what a row of the corpus is, and which head answers it.

A language model has an output for every id, at every position that counts; a sequence model has one
row of outputs for a whole example.
"""

from typing import Literal, get_args

Task = Literal[
    "causal-lm", "prompt-target", "messages", "classification", "multi-label", "regression"
]
"""causal-lm predicts all of a text, prompt-target the target after a prompt, messages the
assistant's turns of a chat; classification says one class of several, multi-label any number of
them, regression a number."""

TASKS: tuple[Task, ...] = get_args(Task)
LANGUAGE_TASKS: frozenset[str] = frozenset({"causal-lm", "prompt-target", "messages"})
GENERATION_TASKS: frozenset[str] = frozenset({"prompt-target", "messages"})


def models_language(task: str) -> bool:
    """Tell whether the task's model is a causal language model; else it is a sequence model."""
    return task in LANGUAGE_TASKS


def generates(task: str) -> bool:
    """Tell whether the task has references that generated text is compared with."""
    return task in GENERATION_TASKS


def outputs_of(task: str, classes: tuple[str, ...] | list[str]) -> int:
    """Return how many outputs a sequence model of the task has."""
    return 1 if task == "regression" else len(classes)
