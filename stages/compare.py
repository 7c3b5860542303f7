"""compare: the scores of two models on the same test rows, and whether they differ."""

from collections.abc import Mapping
from pathlib import Path
from textwrap import fill
from typing import Any

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.evaluate.options import EvaluateParams
from pipeline.evaluate.predictions import read_predictions
from pipeline.evaluate.significance import PairedResult, compare_scores
from pipeline.report.results import ModelMetrics, load_metrics
from pipeline.report.words import UNKNOWN, count
from pipeline.scores.registry import headline, reported, scores_of
from pipeline.visible import visible
from pipeline.written_by import remedy
from stages.command import params_option, stage
from stages.parameters import section
from stages.project import DATA
from stages.tables import width_of

GROUPS = ("students", "teachers")
"""The groups of models that are searched for a name, in this order."""
NUMBER = 10
"""Characters of a model's column."""


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--metric", help="A score, or a GLUE task's name; without it, all scores.")
@params_option
@stage
def compare(first: str, second: str, metric: str | None, params: Path) -> None:
    """Compare two models on the same test rows.

    FIRST and SECOND are students or teachers; the rows are those that both answered. The
    difference is FIRST - SECOND, with its bootstrap interval; p is how often a difference as large
    arises by chance if the models are equal.

    \b
    Example:
      decant compare aligned soft-labels
    """
    options: EvaluateParams = section(params, "evaluate", EvaluateParams)
    known = {group: section(params, group, dict[str, Any]) for group in GROUPS}
    groups = _group(first, known), _group(second, known)
    metrics = _metrics(groups[0], first), _metrics(groups[1], second)
    task = metrics[0].task
    if metrics[1].task != task:
        raise IncompatibleError(
            f"{first} is a model of the task {task}, {second} of {metrics[1].task}; expected "
            "the same task; compare models of one corpus"
        )
    headline_name = metric or metrics[0].score
    results = compare_scores(
        read_predictions(_predictions(groups[0], first)),
        read_predictions(_predictions(groups[1], second)),
        task,
        [headline(task, metric, key="--metric")] if metric else None,
        options.intervals.resamples,
        options.intervals.seed,
        confidence=options.intervals.confidence,
        tokenizer=options.tokenizer,
        classes=metrics[0].classes,
    )
    order = reported(task, headline(task, headline_name))
    shown = sorted((r for r in results if r.metric in order), key=lambda r: order.index(r.metric))
    console = Console(highlight=False)
    if shown:
        console.print(_fitting(console, first, second, shown, options.intervals.confidence))
    compared = {result.metric for result in shown}
    left_out = [
        name
        for name, score in scores_of(task).items()
        if score.across_tokenizers and name in order and name not in compared
    ]
    if left_out and not metric:
        console.print(f"not compared: {', '.join(left_out)} (the models count different tokens)")


def _group(name: str, known: Mapping[str, Mapping[str, Any]]) -> str:
    """Return whether a name is a student's or a teacher's, by the predictions that there are."""
    for group in GROUPS:
        if _predictions(group, name).is_file():
            return group
    for group in GROUPS:
        if name in known[group]:
            path = _predictions(group, name)
            raise ConfigError(f"{name}: not evaluated yet, {path} is missing; {remedy(path)}")
    there = sorted(
        path.stem for group in GROUPS for path in (DATA / "predictions" / group).glob("*.jsonl")
    )
    evaluated = f"there are those of {', '.join(there)}" if there else "no model was evaluated yet"
    raise ConfigError(
        f"{name}: no predictions of such a student or teacher, {evaluated}; correct the name, or "
        "add it to params.yaml"
    )


def _predictions(group: str, name: str) -> Path:
    return DATA / "predictions" / group / f"{name}.jsonl"


def _metrics(group: str, name: str) -> ModelMetrics:
    return load_metrics(DATA / "metrics" / group / f"{name}.json", name)


def _fitting(
    console: Console, first: str, second: str, results: list[PairedResult], confidence: float
) -> Table:
    """Return the widest of three tables that a line has room for, or else the narrowest."""
    tables = [
        _table(first, second, results, confidence, has_rows=has_rows, is_narrow=is_narrow)
        for has_rows, is_narrow in ((True, False), (False, False), (False, True))
    ]
    fits = (table for table in tables if width_of(console, table) <= console.width)
    return next(fits, tables[-1])


def _table(
    first: str,
    second: str,
    results: list[PairedResult],
    confidence: float,
    *,
    has_rows: bool,
    is_narrow: bool,
) -> Table:
    """Set out the scores of two models.

    Args:
        first: One model.
        second: The other.
        results: The rows of the table.
        confidence: Of the intervals.
        has_rows: Whether the rows that were compared are a column, or said below.
        is_narrow: Whether names of scores, and intervals, take two lines.
    """
    counts = dict.fromkeys(f"{result.rows:,}" for result in results)
    table = Table(
        box=None,
        header_style="bold",
        padding=(0, 1, 0, 0),
        caption=None if has_rows else f"over {' and '.join(counts)} test rows",
        caption_justify="left",
    )
    table.add_column("test score", no_wrap=True)
    # A model's name may be long; its column is as wide as its numbers.
    for name in (first, second):
        table.add_column(Text(visible(name)), justify="right", overflow="fold", max_width=NUMBER)
    columns = ["difference", f"{confidence:.0%} interval", "p", *(["rows"] if has_rows else [])]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for result in results:
        arrow = "↓" if result.lower_is_better else "↑"
        words = result.metric.replace("_", " ")
        name = fill(words, NUMBER).replace(" ", "_") if is_narrow else result.metric
        table.add_row(
            Text(f"{name} {arrow}"),
            _number(result.a),
            _number(result.b),
            _signed(result.difference, 3),
            Text(_interval(result, separator="\n" if is_narrow else " ")),
            f"{result.p_value:.3f}" if result.p_value >= 0.001 else "<.001",
            *([f"{result.rows:,}"] if has_rows else []),
        )
    return table


def _interval(result: PairedResult, *, separator: str) -> str:
    if result.low is None or result.high is None:
        return UNKNOWN
    return f"[{_signed(result.low, 2)},{separator}{_signed(result.high, 2)}]"


def _signed(value: float, digits: int) -> str:
    return f"{'+' if value >= 0 else '-'}{_short(abs(value), digits)}"


def _number(value: float) -> str:
    """Four digits that count."""
    return f"{'-' if value < 0 else ''}{_short(abs(value), 4)}"


def _short(value: float, digits: int) -> str:
    """A number that is not negative in at most seven characters: 7.7M for millions."""
    if value >= 1e12 or 0 < value < 1e-4:
        return f"{value:.1e}"
    if value >= 1e6:
        return count(value).replace(" ", "")
    return f"{value:,.0f}" if value >= 10 ** min(digits, 3) else f"{value:.{digits}g}"


if __name__ == "__main__":
    compare()
