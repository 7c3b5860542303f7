"""compare: the scores of two models on the same test rows, and whether they differ."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.evaluate.predictions import read_predictions
from pipeline.evaluate.scores import SCORES, headline, reported
from pipeline.evaluate.significance import PairedResult, compare_scores
from pipeline.provenance import read_json
from stages.command import params_option, stage
from stages.parameters import section
from stages.project import DATA
from stages.sections.evaluate import EvaluateParams

GROUPS = ("students", "teachers")
"""Where a name is looked for, in this order."""


@click.command()
@click.argument("first")
@click.argument("second")
@click.option("--metric", help="A score, or a GLUE task's name; without it, all scores.")
@params_option
@stage
def compare(first: str, second: str, metric: str | None, params: Path) -> None:
    """Compare FIRST with SECOND, students or teachers, on the test rows that both answered.

    The difference is FIRST - SECOND, with its bootstrap interval; p is how often a difference as
    large arises by chance where the models are equal.

    \b
    Example:
      decant compare aligned soft-labels
    """
    options: EvaluateParams = section(params, "evaluate", EvaluateParams)
    groups = _group(first), _group(second)
    metrics = _metrics(groups[0], first), _metrics(groups[1], second)
    task = metrics[0]["task"]
    if metrics[1]["task"] != task:
        raise IncompatibleError(
            f"{first} is a model of the task {task}, {second} of {metrics[1]['task']}; expected "
            "the same task; compare models of one corpus"
        )
    asked = metric or metrics[0]["score"]
    results = compare_scores(
        read_predictions(_predictions(groups[0], first)),
        read_predictions(_predictions(groups[1], second)),
        task,
        [headline(task, metric, key="--metric")] if metric else None,
        options.intervals.resamples,
        options.intervals.seed,
        confidence=options.intervals.confidence,
        classes=metrics[0].get("classes"),
    )
    order = reported(task, headline(task, asked))
    shown = sorted((r for r in results if r.metric in order), key=lambda r: order.index(r.metric))
    console = Console(highlight=False)
    console.print(_table(first, second, shown, options.intervals.confidence))


def _group(name: str) -> str:
    for group in GROUPS:
        if _predictions(group, name).is_file():
            return group
    there = sorted(
        path.stem for group in GROUPS for path in (DATA / "predictions" / group).glob("*.jsonl")
    )
    raise ConfigError(
        f"{name}: no predictions of such a student or teacher, there are those of "
        f"{', '.join(there) or 'none'}; run evaluate or evaluate-teacher, or correct the name"
    )


def _predictions(group: str, name: str) -> Path:
    return DATA / "predictions" / group / f"{name}.jsonl"


def _metrics(group: str, name: str) -> dict[str, Any]:
    return read_json(DATA / "metrics" / group / f"{name}.json")


def _table(first: str, second: str, results: list[PairedResult], confidence: float) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("test score", no_wrap=True)
    # A model's name may be long; its column is as wide as its numbers.
    for name in (first, second):
        table.add_column(name, justify="right", overflow="fold", max_width=10)
    for column in ("difference", f"{confidence:.0%} interval", "p", "rows"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in results:
        arrow = "↓" if SCORES[one.metric].lower_is_better else "↑"
        table.add_row(
            f"{one.metric} {arrow}",
            _number(one.a),
            _number(one.b),
            _signed(one.difference, 3),
            f"[{_signed(one.low, 2)}, {_signed(one.high, 2)}]".replace("[", r"\["),
            f"{one.p_value:.3f}" if one.p_value >= 0.001 else "<.001",
            f"{one.rows:,}",
        )
    return table


def _signed(value: float, digits: int) -> str:
    return f"{value:+,.0f}" if abs(value) >= 100 else f"{value:+.{digits}g}"


def _number(value: float) -> str:
    """Four digits that count, and no exponent."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


if __name__ == "__main__":
    compare()
