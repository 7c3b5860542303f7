"""Pairs of students for paired tests, and their results in a report.

One model may be significantly better although the intervals of both overlap, because they were
measured on the same rows. So the differences per row are tested, in `evaluate.significance`.
"""

from itertools import combinations

from pydantic import BaseModel, ConfigDict

from pipeline.report.compare import Comparison

# Eight students give 28 pairs; nobody reads longer tables.
MAX_STUDENTS = 8
SIGNIFICANT = 0.05


class PairedTest(BaseModel):
    """Two students on the same test rows.

    Attributes:
        first: One student.
        second: The other.
        metric: The compared metric.
        a: The value of the first.
        b: The value of the second.
        difference: First minus second.
        low: Lower end of the difference's interval; None with too few rows.
        high: Its upper end.
        p_value: Probability of a difference at least as large if both were equally good.
        rows: Rows that both answered.
    """

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    first: str
    second: str
    metric: str
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    p_value: float
    rows: int

    @property
    def interval(self) -> tuple[float, float] | None:
        """Both ends of the interval, where there is one."""
        return None if self.low is None or self.high is None else (self.low, self.high)

    @property
    def is_significant(self) -> bool:
        """Whether the difference is more than chance at five percent, for this pair alone."""
        return self.p_value < SIGNIFICANT


def pairs_of(comparison: Comparison) -> list[tuple[str, str]]:
    """Return the pairs of students to test: all of one teacher's, or with many each and the best.

    Args:
        comparison: All models of the run.
    """
    found: list[tuple[str, str]] = []
    for teacher in (row.name for row in comparison.rows if row.is_teacher):
        names = [row.name for row in comparison.students if row.teacher == teacher]
        best = comparison.best_student(teacher)
        if len(names) <= MAX_STUDENTS:
            found += combinations(names, 2)
        elif best is not None:
            found += [(best.name, name) for name in names if name != best.name]
    return found
