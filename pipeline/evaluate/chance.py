"""The score at chance: the best score of a model that gives every row the same answer.

A score below it says nothing about a model, and a retention is meaningless there.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np

from pipeline.evaluate.predictions import Row, score_rows
from pipeline.scores.metric import values
from pipeline.scores.registry import scores_of
from pipeline.tasks import models_language

MAX_SETS = 64
"""Sets of labels that are tried, the most frequent labels first."""


def score_at_chance(
    rows: Sequence[Row], task: str, score: str, *, classes: int | None, vocab: int
) -> float | None:
    """Return a score of the best constant answer; None if the score has no such value.

    A constant answer is one class, one set of classes, the mean number, or no text. For a language
    model's likelihood it is the uniform distribution over ids. Correlations are 0.

    Args:
        rows: Predictions of some model; only the questions in them are used.
        task: The corpus's task.
        score: The score.
        classes: How many classes there are.
        vocab: Ids that a language model chooses from.
    """
    if score == "ece":
        return None
    if task == "regression" and score != "mse":
        return 0.0
    found = [
        values(scored.metrics, len(scored.rows))[score]
        for answered in _constant_answers(rows, task, vocab)
        for scored in score_rows(answered, task, classes=classes)
        if score in scored.metrics
    ]
    return min(found) if scores_of(task)[score].lower_is_better else max(found)


def _constant_answers(rows: Sequence[Row], task: str, vocab: int) -> list[list[Row]]:
    """Return the rows with each constant answer that could score best."""
    if models_language(task):
        silent = {"text": ""}
        return [
            [
                row | {"nats": row["targets"] * math.log(vocab)} | (silent if "text" in row else {})
                for row in rows
            ]
        ]
    if task == "regression":
        mean = float(np.mean([row["target"] for row in rows]))
        return [[row | {"predicted": mean} for row in rows]]
    if task == "multi-label":
        targets = np.array([row["targets"] for row in rows], dtype=np.float64)
        order = np.argsort(-targets.sum(axis=0), kind="stable")
        sets = [np.isin(np.arange(len(order)), order[:many]) for many in range(1, len(order) + 1)]
        frequent = Counter(map(tuple, targets)).most_common(1)[0][0]
        return [
            [row | {"probabilities": np.asarray(one, float).tolist()} for row in rows]
            for one in [frequent, *sets[:MAX_SETS]]
        ]
    # F1 of two classes is that of the second, even if that is the rarer one.
    frequent = Counter(row["label"] for row in rows).most_common(2)
    said = [{"predicted": label, "probability": 1.0} for label, _ in frequent]
    return [[row | one for row in rows] for one in said]
