"""Every score by name: its direction, the tasks that have it, and which one a task is judged by."""

from dataclasses import dataclass

from pipeline.errors import ConfigError
from pipeline.tasks import GENERATION_TASKS, LANGUAGE_TASKS

ONE_CLASS = frozenset({"classification"})
SETS = frozenset({"multi-label"})
NUMBERS = frozenset({"regression"})


@dataclass(frozen=True, slots=True)
class Score:
    """What a score is.

    Attributes:
        lower_is_better: Whether less of it is better.
        tasks: The tasks that have it.
        only_asked: Whether it is reported only where it is the headline.
    """

    lower_is_better: bool
    tasks: frozenset[str]
    only_asked: bool = False


SCORES: dict[str, Score] = {
    "perplexity": Score(True, LANGUAGE_TASKS),
    "nats_per_token": Score(True, LANGUAGE_TASKS),
    "perplexity_per_word": Score(True, LANGUAGE_TASKS),
    "perplexity_per_byte": Score(True, LANGUAGE_TASKS),
    "bits_per_byte": Score(True, LANGUAGE_TASKS),
    "bleu": Score(False, GENERATION_TASKS),
    "chrf": Score(False, GENERATION_TASKS),
    "rouge1": Score(False, GENERATION_TASKS),
    "rouge2": Score(False, GENERATION_TASKS),
    "rougeL": Score(False, GENERATION_TASKS),
    "cer": Score(True, GENERATION_TASKS),
    "wer": Score(True, GENERATION_TASKS),
    "exact_match": Score(False, GENERATION_TASKS),
    "accuracy": Score(False, ONE_CLASS | SETS),
    "f1": Score(False, ONE_CLASS | SETS),
    "f1_macro": Score(False, SETS),
    "matthews": Score(False, ONE_CLASS),
    "accuracy_f1": Score(False, ONE_CLASS, only_asked=True),
    "ece": Score(True, ONE_CLASS | SETS),
    "pearson": Score(False, NUMBERS),
    "spearman": Score(False, NUMBERS),
    "mse": Score(True, NUMBERS),
    "pearson_spearman": Score(False, NUMBERS, only_asked=True),
}

GLUE: dict[str, str] = {
    "cola": "matthews",
    "sst2": "accuracy",
    "mrpc": "accuracy_f1",
    "qqp": "accuracy_f1",
    "stsb": "pearson_spearman",
    "mnli": "accuracy",
    "qnli": "accuracy",
    "rte": "accuracy",
    "wnli": "accuracy",
}
"""The score that GLUE (arXiv 1804.07461) judges each of its tasks by; where it names two, their
mean, as in its overall score."""

HEADLINE: dict[str, str] = {
    "causal-lm": "perplexity",
    "prompt-target": "perplexity",
    "messages": "perplexity",
    "classification": "accuracy",
    "multi-label": "f1",
    "regression": "pearson",
}
"""The score a task is judged by where none is asked for."""


def headline(task: str, asked: str | None, *, key: str = "evaluate.score") -> str:
    """Return the score that models of a task are judged by.

    Args:
        task: The corpus's task.
        asked: A score or a GLUE task; None for the task's own.
        key: Where it was asked, for errors.

    Raises:
        ConfigError: If the task has no such score.
    """
    if asked is None:
        return HEADLINE[task]
    score = GLUE.get(asked, asked)
    if score not in SCORES or task not in SCORES[score].tasks:
        there = [name for name, known in SCORES.items() if task in known.tasks]
        glue = [name for name, known in GLUE.items() if known in there]
        raise ConfigError(
            f"{key}: found {asked!r}, the task {task} has {', '.join([*there, *glue])}; "
            "choose one of them"
        )
    return score


def reported(task: str, score: str) -> list[str]:
    """Return the scores that are reported for a task: the headline first."""
    others = [
        name
        for name, known in SCORES.items()
        if task in known.tasks and not known.only_asked and name != score
    ]
    return [score, *others]
