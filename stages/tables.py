"""Prints tables in the terminal without cutting their lines."""

from rich.console import Console
from rich.table import Table

WIDEST = 1000
"""More characters than any table has, so that the width a table needs can be measured."""


def width_of(console: Console, table: Table) -> int:
    """Return how many characters wide a table is."""
    return console.measure(table, options=console.options.update(width=WIDEST)).maximum


def print_whole(console: Console, table: Table) -> None:
    """Print a table without cutting lines that are longer than the terminal's.

    A line that is cut helps nobody, least of all in a file or a pipe.
    """
    width = max(width_of(console, table), console.width)
    Console(highlight=False, width=width, file=console.file).print(table)
