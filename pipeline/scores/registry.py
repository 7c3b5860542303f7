"""All scores by name, and the one that a task's models are judged by."""

from collections.abc import Sequence

from pipeline.errors import ConfigError
from pipeline.registry import Registry
from pipeline.scores.metric import Metric
from pipeline.scores.score import Answers, Score

SCORES: Registry[Score] = Registry(
    "score",
    package="pipeline.scores",
    group="decant.scores",
    name_of=lambda part: f"{part.answers.kind}.{part.name}" if isinstance(part, Score) else None,
)
"""Scores by the kind of answers and their name, such as `text.bleu`."""

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


def scores_of(task: str) -> dict[str, Score]:
    """Return the scores that a task has, by name."""
    return {score.name: score for score in SCORES.values() if task in score.tasks}


def answers_of(task: str) -> list[type[Answers]]:
    """Return the sorts of answers that a task's models give."""
    return list(dict.fromkeys(score.answers for score in scores_of(task).values()))


def metrics_of(answers: Answers) -> dict[str, Metric]:
    """Return the metric of every score that judges such answers, by the score's name."""
    metrics = {
        score.name: score.metric(answers)
        for score in SCORES.values()
        if score.answers is type(answers)
    }
    return {name: metric for name, metric in metrics.items() if metric is not None}


def headline(task: str, score: str | None, *, key: str = "evaluate.score") -> str:
    """Return the name of the score that models of a task are judged by.

    Args:
        task: The corpus's task.
        score: A score or a GLUE task; None for the task's default.
        key: The parameter that names it, for errors.

    Raises:
        ConfigError: If the task has no such score.
    """
    known = scores_of(task)
    if score is None:
        return next(name for name, known_score in known.items() if known_score.is_default)
    name = GLUE.get(score, score)
    if name not in known:
        glue = [glue_task for glue_task, judge in GLUE.items() if judge in known]
        raise ConfigError(
            f"{key}: found {score!r}, the task {task} has {', '.join([*known, *glue])}; "
            "choose one of them"
        )
    return name


def known_names() -> Sequence[str]:
    """Return the names of all scores, of whatever task, and GLUE's tasks."""
    return [*dict.fromkeys(score.name for score in SCORES.values()), *GLUE]


def reported(task: str, score: str) -> list[str]:
    """Return the names of the scores that are reported for a task, the headline `score` first."""
    others = (name for name, known in scores_of(task).items() if not known.is_optional)
    return [score, *(name for name in others if name != score)]
