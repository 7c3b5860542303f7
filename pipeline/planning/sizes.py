"""Reads and shows numbers of bytes, such as 200GB and 1.5TiB."""

import re

from pipeline.errors import ConfigError

UNITS = {
    "B": 1,
    **{f"{prefix}B": 1000**power for power, prefix in enumerate("kMGTP", start=1)},
    **{f"{prefix}iB": 1024**power for power, prefix in enumerate("KMGTP", start=1)},
}
SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*")


def parse_size(text: str, *, key: str) -> int:
    """Return the number of bytes of a size such as 200GB, 1.5TiB or 500MB.

    Args:
        text: The size.
        key: The option's name, for the error.

    Raises:
        ConfigError: If the text is not a size.
    """
    match = SIZE.fullmatch(text)
    units = {unit.lower(): number for unit, number in UNITS.items()}
    if match is None or match[2].lower() not in units or not float(match[1]):
        raise ConfigError(
            f"{key}: found {text!r}, expected a number and a unit, such as 200GB, 1.5TiB or 500MB "
            f"({', '.join(UNITS)}); correct it"
        )
    return int(float(match[1]) * units[match[2].lower()])


def show_size(count: float | int) -> str:
    """Return bytes in decimal units with three digits, such as 1.23 GB."""
    unit = "B"
    for unit in ("B", "kB", "MB", "GB", "TB", "PB"):
        if abs(count) < 999.5 or unit == "PB":
            break
        count /= 1000
    return f"{count:,.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
