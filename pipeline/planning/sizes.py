"""Bytes as people write and read them: 200GB, 1.5TiB, 500MB."""

import re

from pipeline.errors import ConfigError

UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGTP", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTP", start=1)},
}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str, *, key: str) -> int:
    """Return the bytes that a size as 200GB, 1.5TiB or 500MB means.

    Args:
        text: The size.
        key: What it is given as, for the error.

    Raises:
        ConfigError: If it is none.
    """
    found = SIZE.fullmatch(text)
    units = {unit.lower(): number for unit, number in UNITS.items()}
    if found is None or found[2].lower() not in units or not float(found[1]):
        raise ConfigError(
            f"{key}: found {text!r}, expected a number and a unit, as 200GB, 1.5TiB or 500MB "
            f"({', '.join(UNITS)}); correct it"
        )
    return int(float(found[1]) * units[found[2].lower()])


def show_size(count: float | int) -> str:
    """Return bytes in decimal units with three digits, as 1.23 GB."""
    unit = "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(count) < 999.5 or unit == "PB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
