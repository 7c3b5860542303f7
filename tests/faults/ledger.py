"""What the fault tests did and found, counted by kind of fault; printed as a table at the end."""

from collections import defaultdict
from dataclasses import dataclass

HEADER = ("fault", "injected", "detected", "wrong", "lost")


@dataclass
class Count:
    """How often one kind of fault was injected, and what came of it.

    `detected` are those that ended as promised: an error of ours, or a recovery that equals the
    undisturbed run. `wrong` are those after which a wrong value was read, `lost` those after which
    something that had been committed was gone.
    """

    injected: int = 0
    detected: int = 0
    wrong: int = 0
    lost: int = 0


class Ledger:
    """The counts of a session by kind of fault."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, Count] = defaultdict(Count)

    def record(
        self, fault: str, *, detected: bool = True, wrong: bool = False, lost: bool = False
    ) -> None:
        """Count one fault that was injected, before its outcome is asserted."""
        count = self.counts[fault]
        count.injected += 1
        count.detected += detected
        count.wrong += wrong
        count.lost += lost

    def table(self) -> list[str]:
        """Return the lines of the table: a row a kind of fault, then the sum."""
        rows = [
            (fault, count.injected, count.detected, count.wrong, count.lost)
            for fault, count in sorted(self.counts.items())
        ]
        rows.append(("sum", *(sum(column) for column in list(zip(*rows, strict=True))[1:])))
        width = max(len(str(row[0])) for row in rows)
        lines = [_line(HEADER, width)]
        return [*lines, *(_line(row, width) for row in rows)]


def _line(row: tuple[object, ...], width: int) -> str:
    return str(row[0]).ljust(width) + "".join(f"{cell:>10}" for cell in row[1:])


SESSION = Ledger()
"""The ledger of this session; tests reach it by the fixture `ledger`."""
