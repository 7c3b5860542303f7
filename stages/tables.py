"""Tables in the terminal."""

from rich.console import Console
from rich.table import Table

WIDEST = 1000
"""Characters that no table has, so that what one needs can be measured."""


def width_of(console: Console, table: Table) -> int:
    """Return how many characters a table needs to cut nothing off."""
    return console.measure(table, options=console.options.update(width=WIDEST)).maximum


def print_whole(console: Console, table: Table) -> None:
    """Print a table with whole lines, be they longer than the terminal's.

    What is cut off is of use to nobody, least of all to a file or a pipe.
    """
    width = max(width_of(console, table), console.width)
    Console(highlight=False, width=width, file=console.file).print(table)
