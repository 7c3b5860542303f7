"""Tables of measures: one row per model, one column per metric, each value with its interval.

Columns without any value are left out, and so are tables without columns.
"""

from dataclasses import dataclass

from pipeline.report.compare import Comparison, Row
from pipeline.report.measures import Group, Measure, groups_of, measure_of
from pipeline.report.words import UNKNOWN


@dataclass(frozen=True, slots=True)
class Cell:
    """One value as it is shown.

    Attributes:
        text: The value with its unit.
        interval: Its confidence interval; empty where unknown.
        is_best: Whether no student has a better value.
    """

    text: str
    interval: str = ""
    is_best: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """One model's cells, in the order of the columns."""

    name: str
    is_teacher: bool
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class Grid:
    """One table of measures.

    Attributes:
        group: What it is about and how it reads.
        measures: Its columns.
        lines: Its rows.
    """

    group: Group
    measures: tuple[Measure, ...]
    lines: tuple[Line, ...]

    @property
    def has_intervals(self) -> bool:
        """Whether some value has one."""
        return any(cell.interval for line in self.lines for cell in line.cells)


def grids(comparison: Comparison) -> list[Grid]:
    """Return the tables that have something to show.

    Args:
        comparison: All models of the run.
    """
    found = []
    for group in groups_of(comparison.task):
        rows = comparison.students if group.against_teacher else comparison.rows
        values = {
            measure: [_value(row, measure, group) for row in rows] for measure in group.measures
        }
        known = {
            measure: column
            for measure, column in values.items()
            if any(value is not None for value in column)
        }
        # The table above already has the headline.
        if not known or set(known) == {comparison.headline}:
            continue
        bests = {
            measure: _bests(comparison, rows, column, measure) for measure, column in known.items()
        }
        lines = tuple(
            Line(
                row.name,
                row.is_teacher,
                tuple(
                    _cell(row, measure, column[place], bests[measure][row.teacher], group)
                    for measure, column in known.items()
                ),
            )
            for place, row in enumerate(rows)
        )
        found.append(Grid(group, tuple(known), lines))
    return found


def signatures(comparison: Comparison) -> dict[str, str]:
    """Return how sacrebleu computed each measure, from all models, which agree or are listed."""
    found: dict[str, list[str]] = {}
    for row in comparison.rows:
        for metric, signature in row.metrics.signatures.items():
            found.setdefault(metric, []).append(signature)
    return {
        measure_of(metric, comparison.task).heading: "; ".join(dict.fromkeys(known))
        for metric, known in found.items()
    }


def _value(row: Row, measure: Measure, group: Group) -> float | None:
    """Return a model's value of a measure."""
    if group.against_teacher:
        return row.metrics.against_teacher.get(measure.key)
    return row.metrics.test(measure.key)


def _bests(
    comparison: Comparison, rows: tuple[Row, ...], column: list[float | None], measure: Measure
) -> dict[str, float | None]:
    """Return the best value of each teacher's students; None if equal or incomparable."""
    found: dict[str, float | None] = {}
    for teacher in {row.teacher for row in rows}:
        known = [
            value
            for row, value in zip(rows, column, strict=True)
            if value is not None and not row.is_teacher and row.teacher == teacher
        ]
        is_contest = len(set(known)) > 1 and comparison.comparable(measure.key) == measure.key
        best = min if measure.is_lower_better else max
        found[teacher] = best(known) if is_contest else None
    return found


def _cell(
    row: Row, measure: Measure, value: float | None, best: float | None, group: Group
) -> Cell:
    if value is None:
        return Cell(UNKNOWN)
    interval = None if group.against_teacher else row.metrics.test_intervals.get(measure.key)
    is_best = value == best and not row.is_teacher
    return Cell(measure.show(value), measure.bounds(interval), is_best)
