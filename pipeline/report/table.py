"""The table in the terminal at the end of a run."""

from textwrap import fill

from rich import box
from rich.table import Table
from rich.text import Text

from pipeline.report import words
from pipeline.report.compare import Comparison, Row
from pipeline.report.measures import measure_of, terminal_measures
from pipeline.visible import visible

# The width that rich assumes for a pipe.
PIPE = 80
MIN_NAME, MAX_NAME = 12, 24
MAX_EXTRA = 3
LAST = "latency"
GIVEN_UP = (LAST, "tok/s", "params", "top-1", "KL", "faster", "smaller")
"""Columns that a narrow line has no room for, the first ones first; the page has them all."""
RETENTION = 10
"""Characters of a line that says why there is no retention."""


def results_table(comparison: Comparison, *, width: int = PIPE) -> Table:
    """Build the table: teachers in bold, each followed by its students, the best one marked.

    Columns without any value are left out; further measures of the task are added if the terminal
    is wide enough.

    Args:
        comparison: All models of the run.
        width: Characters of a line.
    """
    direction = f" (teacher's {comparison.headline.heading} / student's)"
    notes = [
        "Retention is the share of the teacher's quality kept"
        + (direction if comparison.is_lower_better else "")
        + "."
    ]
    if any(row.no_retention for row in comparison.rows):
        notes.append("At chance: not clearly better than the same answer to every row.")
    if comparison.tokens_differ:
        notes.append("Models count different tokens: they are compared by the byte.")
    notes.append("★ is best. KL in nats.")
    table = Table(
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=0,
        caption=" ".join(notes),
        caption_justify="left",
    )
    names = [_name(comparison, row) for row in comparison.rows]
    longest = min(MAX_NAME, max(map(len, names)))
    columns = _fitting(comparison, width - longest, foldable=max(0, longest - MIN_NAME))
    table.add_column("model", overflow="fold")
    for heading, _ in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    for index, row in enumerate(comparison.rows):
        last = index + 1 == len(comparison.rows) or comparison.rows[index + 1].is_teacher
        table.add_row(
            # As text, not markup: a name may contain brackets.
            Text(visible(names[index])),
            *[values[index] for _, values in columns],
            style="bold" if row.is_teacher else None,
            end_section=last,
        )
    return table


def _name(comparison: Comparison, row: Row) -> str:
    """Return a model's name, with its kind."""
    if row.is_teacher:
        return f"{row.name} (teacher)"
    best = comparison.best_student(row.teacher)
    return f"{row.name} ★" if best is not None and best.name == row.name else row.name


def _retention(row: Row) -> str:
    """Return the retention, or in short lines why there is none."""
    if row.quality is None or not row.no_retention:
        return words.percent(row.retention)
    return fill(row.no_retention, RETENTION)


def _fitting(comparison: Comparison, room: int, *, foldable: int) -> list[tuple[str, list[str]]]:
    """Columns that are known, with as many further measures as a line has room for.

    Where they have none, names are folded by `foldable` characters before columns are given up.
    """
    columns = _columns(comparison)
    quality, always = (
        [column for column in some if _is_known(column)] for some in (columns[:2], columns[2:])
    )
    wanted = [column for column in _further(comparison) if _is_known(column)]
    room -= sum(map(_width, quality + always))
    if wanted and room < _width(wanted[0]) and always and always[-1][0] == LAST:
        # Quality matters more than latency, which is on the page.
        room += _width(always.pop())
    for heading in GIVEN_UP:
        if room + foldable < 0:
            left = [column for column in always if column[0] != heading]
            room += sum(map(_width, always)) - sum(map(_width, left))
            always = left
    further = []
    for column in wanted:
        if len(further) < MAX_EXTRA and _width(column) <= room:
            further.append(column)
            room -= _width(column)
    return quality + further + always


def _is_known(column: tuple[str, list[str]]) -> bool:
    return any(value != words.UNKNOWN for value in column[1])


def _width(column: tuple[str, list[str]]) -> int:
    """Return the width of a column, with the space before it."""
    heading, values = column
    return 1 + max(len(line) for text in (heading, *values) for line in text.split("\n"))


def _further(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Measures of the task other than the headline."""
    found = []
    for key in terminal_measures(comparison.task):
        measure = measure_of(comparison.comparable(key), comparison.task)
        heading = measure.short or measure.heading
        if measure.key != comparison.headline.key and heading not in [name for name, _ in found]:
            values = [measure.show(row.metrics.test(measure.key)) for row in comparison.rows]
            found.append((heading, values))
    return found


def _columns(comparison: Comparison) -> list[tuple[str, list[str]]]:
    """Return heading and cells of every column except the name."""
    headline = comparison.headline

    def agreement(row: Row, name: str) -> float | None:
        return None if row.metrics.agreement is None else getattr(row.metrics.agreement, name)

    rows = comparison.rows
    return [
        (
            f"test\n{headline.short or headline.heading}",
            [headline.show(row.quality) for row in rows],
        ),
        ("retention", [_retention(row) for row in rows]),
        ("KL", [words.number(agreement(row, "kl"), 3) for row in rows]),
        ("top-1", [words.percent(agreement(row, "top1")) for row in rows]),
        ("params", [words.count(row.metrics.parameters) for row in rows]),
        ("smaller", [words.times(row.size_ratio) for row in rows]),
        ("tok/s", [words.count(row.metrics.tokens_per_second) for row in rows]),
        ("faster", [words.times(row.speed_ratio) for row in rows]),
        (LAST, [words.seconds(row.metrics.latency_seconds) for row in rows]),
    ]
