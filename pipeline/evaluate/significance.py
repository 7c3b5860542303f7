"""How sure a score is: bootstrap intervals of one model, paired tests of two.

For an interval, rows are drawn with replacement, as many as there are; its ends are percentiles of
the scores of the resamples (Efron and Tibshirani, 1993). It does not cover the variation between
training seeds. A paired test asks whether one model is better, or the rows just happen to suit it:
approximate randomisation (Noreen, 1989; Riezler and Maxwell, 2005). If the models were equal, it
would not matter which of them gave which answer. Predictions are swapped row by row at random, and
p is the share of swaps whose difference is at least as large as the one found.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.errors import ConfigError, IncompatibleError, IntegrityError
from pipeline.evaluate.options import IntervalOptions
from pipeline.evaluate.predictions import Identity, Row, identity, score_rows
from pipeline.scores.metric import Floats, Metric
from pipeline.scores.registry import scores_of
from pipeline.scores.score import Score
from pipeline.scores.tokenization import AUTO

# 2^21 counts are 16 MiB.
CHUNK_CELLS = 1 << 21
FEWEST_ROWS = 5
"""Resamples of fewer rows are all alike: an interval of them looks sure where nothing is."""


def bootstrap_intervals(
    metrics: Mapping[str, Metric], rows: int, options: IntervalOptions
) -> dict[str, tuple[float, float]]:
    """Return the low and high end of each metric, all from the same resamples.

    With fewer than five rows there are no intervals.

    Args:
        metrics: Functions of counts over the same rows.
        rows: How many rows there are.
        options: How many resamples, their seed, and the confidence.
    """
    if rows < FEWEST_ROWS:
        return {}
    found: dict[str, list[Floats]] = {name: [] for name in metrics}
    for counts in resampled_counts(rows, options.resamples, np.random.default_rng(options.seed)):
        for name, metric in metrics.items():
            found[name].append(metric(counts))
    return {
        name: percentile_interval(np.concatenate(drawn), options.confidence)
        for name, drawn in found.items()
    }


def resampled_counts(rows: int, resamples: int, generator: np.random.Generator) -> Iterator[Floats]:
    """Yield how often each row is drawn in each resample: [some resamples, rows] at a time."""
    for some in chunk_sizes(rows, resamples):
        drawn = generator.integers(rows, size=(some, rows)) + rows * np.arange(some)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=some * rows)
        yield counts.reshape(some, rows).astype(np.float64)


def chunk_sizes(rows: int, draws: int) -> list[int]:
    """Return how many draws to hold at once, so that memory does not grow with their number."""
    most = max(1, CHUNK_CELLS // rows)
    return [min(most, draws - first) for first in range(0, draws, most)]


def percentile_interval(drawn: Floats, confidence: float) -> tuple[float, float]:
    """Return the percentiles that leave out as much below as above."""
    low, high = np.quantile(drawn, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


logger = logging.getLogger(__name__)

# The question of a row; each task has some of these keys.
ASKED = ("label", "target", "targets", "references")
# What is summed over the rows of one text.
SUMMED = ("nats", "targets", "words", "bytes")
# Sums in another order differ in their last digits; a swap that changes nothing counts as equal.
ROUNDING = 1e-9


@dataclass(frozen=True, slots=True)
class PairedResult:
    """One score of two models on the same rows.

    Attributes:
        metric: The score's name.
        lower_is_better: Whether a smaller value is better.
        a: The first model's value.
        b: The second's.
        difference: a - b.
        low: Low end of the difference's bootstrap interval; None of fewer than five rows.
        high: Its high end.
        p_value: How often a difference as large arises if the models are equal; never 0.
        rows: How many rows were compared.
    """

    metric: str
    lower_is_better: bool
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    p_value: float
    rows: int


def compare_predictions(
    a: Sequence[Row],
    b: Sequence[Row],
    task: str,
    metric: str,
    resamples: int = 1000,
    seed: int = 0,
    *,
    confidence: float = 0.95,
    classes: int | None = None,
    tokenizer: str = AUTO,
) -> PairedResult:
    """Compare two models by one score, on rows joined by identity and never by order.

    Where tokenizers split the texts differently, the rows of one text are summed, and texts are
    joined.

    Args:
        a: Predictions of the first model.
        b: Predictions of the second, for the same rows in any order.
        task: Their task.
        metric: A score of the task.
        resamples: Draws of the bootstrap, and swaps of the test.
        seed: The same seed gives the same numbers.
        confidence: Share of the resamples' differences that the interval holds.
        classes: How many classes there are; None for as many as the rows show.
        tokenizer: How BLEU splits text into words, in sacrebleu's names.

    Raises:
        ConfigError: If the rows have no such score.
        IncompatibleError: If the models answered different rows, or different questions to them.
        IntegrityError: If a row occurs twice in a model's predictions.
    """
    return compare_scores(
        a, b, task, [metric], resamples, seed,
        confidence=confidence, classes=classes, tokenizer=tokenizer,
    )[0]  # fmt: skip


def compare_scores(
    a: Sequence[Row],
    b: Sequence[Row],
    task: str,
    metrics: Sequence[str] | None,
    resamples: int = 1000,
    seed: int = 0,
    *,
    confidence: float = 0.95,
    classes: int | None = None,
    tokenizer: str = AUTO,
) -> list[PairedResult]:
    """Compare two models by several scores, or None for all that both have.

    Rows are scored once for all of them; arguments and errors are those of `compare_predictions`.
    Where the models' tokens differ, scores a token are left out unless they are asked for.
    """
    first, second = _joined(a, b)
    _check_same_questions(first, second)
    # The rows of both models are concatenated: counting the first half gives model a.
    scored = score_rows([*first, *second], task, classes=classes, tokenizer=tokenizer)
    by_name = {name: group for group in scored for name in group.metrics}
    known = scores_of(task)
    if metrics is None:
        tokens_differ = _tokens_differ(first, second)
        written = all(any("text" in row for row in rows) for rows in (first, second))
        metrics = [
            name
            for name, group in by_name.items()
            if (group is scored[0] or written)
            and not (tokens_differ and known[name].across_tokenizers)
        ]
    results: list[PairedResult] = []
    for name in metrics:
        if name not in by_name:
            raise ConfigError(
                f"metric: found {name!r}, both models have {', '.join(by_name)}; choose one of them"
            )
        group = by_name[name]
        if group is not scored[0]:
            _check_same_written(first, second)
        comparable = known[name].across_tokenizers
        if comparable and _tokens_differ(first, second):
            raise IncompatibleError(
                f"{name}: the models count different tokens, expected one tokenizer; compare "
                f"{comparable}"
            )
        metric, rows = group.metrics[name], len(group.rows) // 2
        results.append(_compare(known[name], metric, rows, resamples, seed, confidence))
    return results


def _compare(
    score: Score, metric: Metric, rows: int, resamples: int, seed: int, confidence: float
) -> PairedResult:
    none, once = np.zeros((1, rows)), np.ones((1, rows))

    def differences(draws: Iterable[tuple[Floats, Floats]]) -> Floats:
        return np.concatenate(
            [
                metric(np.concatenate([left, right], axis=1))
                - metric(np.concatenate([right, left], axis=1))
                for left, right in draws
            ]
        )

    value_a = float(metric(np.concatenate([once, none], axis=1))[0])
    value_b = float(metric(np.concatenate([none, once], axis=1))[0])
    difference = value_a - value_b
    # Two streams of one seed, so that interval and test are independent.
    generators = [np.random.default_rng([seed, stream]) for stream in range(2)]
    low, high = None, None
    if rows >= FEWEST_ROWS:
        resampled = differences(
            (counts, np.zeros_like(counts))
            for counts in resampled_counts(rows, resamples, generators[0])
        )
        low, high = percentile_interval(resampled, confidence)
    swapped = differences((1.0 - swaps, swaps) for swaps in _swaps(rows, resamples, generators[1]))
    slack = ROUNDING * max(1.0, abs(value_a), abs(value_b))
    as_large = int((np.abs(swapped) >= abs(difference) - slack).sum())
    return PairedResult(
        metric=score.name,
        lower_is_better=score.lower_is_better,
        a=value_a,
        b=value_b,
        difference=difference,
        low=low,
        high=high,
        p_value=(1 + as_large) / (1 + resamples),
        rows=rows,
    )


def _swaps(rows: int, draws: int, generator: np.random.Generator) -> Iterable[Floats]:
    """Yield a one where the models change places, else a zero: [some draws, rows] at a time."""
    for some in chunk_sizes(rows, draws):
        yield generator.integers(2, size=(some, rows)).astype(np.float64)


def _joined(a: Sequence[Row], b: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Return both models' rows, sorted by identity."""
    left, right = _by_identity(a), _by_identity(b)
    if set(left) != set(right) and all("nats" in row for row in (*a, *b)):
        left, right = _by_text(a), _by_text(b)
    if set(left) != set(right) or not left:
        raise IncompatibleError(
            f"predictions: found {len(left)} rows and {len(right)}, {len(set(left) & set(right))} "
            "of them the same, expected the same rows of one test split; evaluate both models on "
            "one corpus"
        )
    keys = sorted(left)
    return [left[key] for key in keys], [right[key] for key in keys]


def _by_identity(rows: Sequence[Row]) -> dict[Identity, Row]:
    found = {identity(row): row for row in rows}
    if len(found) != len(rows):
        raise IntegrityError(
            f"predictions: found {len(rows)} lines for {len(found)} rows, expected one a row; "
            "evaluate the model again"
        )
    return found


def _by_text(rows: Sequence[Row]) -> dict[Identity, Row]:
    """Rows of language as whole texts, for another tokenizer parts and numbers them differently."""
    found: dict[Identity, Row] = {}
    for row in rows:
        place = (row["source_row"], row["source_row"])
        if place not in found:
            found[place] = dict(row)
            continue
        for name in SUMMED:
            if name in row:
                found[place][name] += row[name]
    return found


def _check_same_written(first: Sequence[Row], second: Sequence[Row]) -> None:
    """Both generated text for the same rows."""
    counts = [sum("text" in row for row in rows) for rows in (first, second)]
    if [("text" in row) for row in first] != [("text" in row) for row in second]:
        raise IncompatibleError(
            f"predictions: found {counts[0]} generated rows and {counts[1]}, expected the same "
            "rows; evaluate both models with one evaluate.generate.rows"
        )


def _check_same_questions(first: Sequence[Row], second: Sequence[Row]) -> None:
    """What the models were asked is the same; only what they said differs."""
    cut = sum(
        one.get("bytes") != other.get("bytes") for one, other in zip(first, second, strict=True)
    )
    if cut:
        logger.warning("%d rows are longer for one model than for the other, which cut them", cut)
    for one, other in zip(first, second, strict=True):
        for key in ASKED:
            # Of language, `targets` is a number of tokens: the tokenizer's, not the question's.
            is_tokens = key == "targets" and "nats" in one
            if key in one and key in other and one[key] != other[key] and not is_tokens:
                raise IncompatibleError(
                    f"predictions: {key} of row {one['row']} differs, expected the same; evaluate "
                    "both models on one corpus"
                )


def _tokens_differ(first: Sequence[Row], second: Sequence[Row]) -> bool:
    return [row.get("targets") for row in first] != [row.get("targets") for row in second]
