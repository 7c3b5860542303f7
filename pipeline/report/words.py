"""Formats numbers for people; an unknown number is a dash."""

UNKNOWN = "–"
# Said in full: type checks at run time do not take an int for a float.
Number = float | int
LETTERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def number(value: Number | None, digits: int = 2) -> str:
    """Return a number with thousands separated and `digits` decimals, and a true minus."""
    # "z" leaves no minus before a zero.
    return UNKNOWN if value is None else f"{value:z,.{digits}f}".replace("-", "−")


def whole(value: int | None) -> str:
    """A whole number with thousands separated."""
    return UNKNOWN if value is None else f"{value:,}"


def counted(value: int, noun: str) -> str:
    """A count with its noun, as in 1 store and 2 stores."""
    return f"{whole(value)} {noun if value == 1 else f'{noun}s'}"


def spelled(value: int) -> str:
    """Return a count for a sentence: in letters below ten."""
    return LETTERS[value] if value < len(LETTERS) else whole(value)


def probability(value: Number) -> str:
    """Return a p-value with three decimals; small ones are not shown as 0.000."""
    return "< 0.001" if value < 0.001 else number(value, 3)


def percent(value: Number | None) -> str:
    """A fraction in percent, to one decimal."""
    return UNKNOWN if value is None else f"{100 * value:.1f}%"


def times(value: Number | None) -> str:
    """A ratio, as in 3.2×."""
    return UNKNOWN if value is None else f"{value:.1f}×" if value < 100 else f"{value:,.0f}×"


def count(value: Number | None) -> str:
    """A count to three significant digits, with K, M or B."""
    if value is None:
        return UNKNOWN
    for unit, size in (("B", 1e9), ("M", 1e6), ("K", 1e3)):
        # From 999.5 on, three digits round up to the next unit.
        if value >= 0.9995 * size:
            return f"{_three(value / size)} {unit}"
    return _three(value)


def data(value: Number | None) -> str:
    """A number of bytes to three significant digits, in powers of a thousand."""
    if value is None:
        return UNKNOWN
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= 0.9995 * size:
            return f"{_three(value / size)} {unit}"
    return f"{_three(value)} B"


def seconds(value: Number | None) -> str:
    """A duration: 0.4 ms, 2.31 s, 4 min 05 s, 3 h 20 min."""
    if value is None:
        return UNKNOWN
    if value < 0.9995:
        return f"{_three(value * 1e3)} ms"
    if value < 59.95:
        return f"{_three(value)} s"
    whole = round(value)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min"


def _three(value: Number) -> str:
    """At most three significant digits, without an exponent; a whole number keeps no decimals."""
    if value == int(value) or value >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"
