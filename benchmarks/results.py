"""Where measurements are kept: one JSON file a benchmark, with the machine it was made on.

The files are committed, so keys are sorted and figures rounded: a new run changes lines that have
changed. A benchmark writes only where it is told to by `--results`, which `make bench` does, so
that an experiment leaves the tree as it was.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click

from benchmarks.synthetic import machine

RESULTS = Path(__file__).parent / "results"
DIGITS = 4
"""Significant digits that are kept; a machine's noise is larger."""

results_option = click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    help="Also write the figures into this directory.",
)


def write(name: str, found: Mapping[str, Any], directory: Path = RESULTS) -> Path:
    """Write the figures of a benchmark with the machine's description; return the file.

    Args:
        name: The benchmark, which names the file.
        found: Its figures, JSON values.
        directory: Where results are kept.
    """
    content = {"benchmark": name, "figures": rounded(found), "machine": machine()}
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.json"
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    return path


def read(name: str, directory: Path = RESULTS) -> dict[str, Any] | None:
    """Return what `write` has written, None if there is nothing."""
    path = directory / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else None


def rounded(value: Any) -> Any:
    """Return JSON values with every float cut to `DIGITS` significant digits."""
    if isinstance(value, Mapping):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one) for one in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value
