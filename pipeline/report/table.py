"""The table a run ends with in the terminal."""

from rich import box
from rich.table import Table
from rich.text import Text

from pipeline.report import words
from pipeline.report.compare import Comparison, Row


def results_table(comparison: Comparison) -> Table:
    """Build the table: teachers in bold, each followed by its students, the best one marked.

    A column that no model has a value for is left out.

    Args:
        comparison: All models of the run.
    """
    # As narrow as it goes: through a pipe rich takes a line to be 80 characters.
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        caption="Retention is the share of the teacher's quality kept"
        + (" (teacher's perplexity / student's)." if comparison.is_lower_better else ".")
        + " ★ keeps most. KL in nats.",
        caption_justify="left",
    )
    columns = [
        (heading, values)
        for heading, values in _columns(comparison)
        if any(value != words.UNKNOWN for value in values)
    ]
    table.add_column("model", overflow="fold")
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for index, row in enumerate(comparison.rows):
        last = index + 1 == len(comparison.rows) or comparison.rows[index + 1].is_teacher
        best = comparison.best_student(row.teacher)
        is_best = best is not None and best.name == row.name and not row.is_teacher
        # Text, not markup: a name may hold brackets.
        name = Text(row.name + (" (teacher)" if row.is_teacher else " ★" if is_best else ""))
        table.add_row(
            name,
            *[values[index] for _, values in columns],
            style="bold" if row.is_teacher else None,
            end_section=last,
        )
    return table


def _columns(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Heading and cells of every column but the name."""
    is_perplexity = comparison.is_lower_better

    def agreement(row: Row, name: str) -> float | None:
        return None if row.metrics.agreement is None else getattr(row.metrics.agreement, name)

    rows = comparison.rows
    return [
        (
            "test\nppl" if is_perplexity else comparison.quality_name.replace(" ", "\n"),
            [words.quality(row.quality, is_perplexity=is_perplexity) for row in rows],
        ),
        ("retention", [words.percent(row.retention) for row in rows]),
        ("KL", [words.number(agreement(row, "kl"), 3) for row in rows]),
        ("top-1", [words.percent(agreement(row, "top1")) for row in rows]),
        ("params", [words.count(row.metrics.parameters) for row in rows]),
        ("smaller", [words.times(row.size_ratio) for row in rows]),
        ("tok/s", [words.count(row.metrics.tokens_per_second) for row in rows]),
        ("faster", [words.times(row.speed_ratio) for row in rows]),
        ("latency", [words.seconds(row.metrics.latency_seconds) for row in rows]),
    ]
