"""The pages of the project, cut into what can be checked: fences, tables, links."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [
        *(ROOT / "docs").glob("*.md"),
        *(
            ROOT / name
            for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md")
        ),
    ]
)


class Fence(NamedTuple):
    page: str
    language: str
    text: str


def fences(*languages: str) -> Iterator[Fence]:
    for page in PAGES:
        for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", page.read_text(), re.M | re.S):
            if language in languages:
                yield Fence(str(page.relative_to(ROOT)), language, text)


def commands(fence: Fence) -> list[str]:
    """The lines of a shell fence without their comments; no command here has a # of its own."""
    lines = (line.split(" #")[0].strip() for line in fence.text.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def tables(text: str) -> dict[str, list[list[str]]]:
    """Rows of cells under each heading, without the head of the table."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ").strip()
        elif line.startswith("|"):
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            found.setdefault(heading, []).append([cell.strip() for cell in cells])
    return {
        heading: [row for row in rows if not re.fullmatch(r"[-:]+", row[0])]
        for heading, rows in found.items()
    }


def anchor(heading: str) -> str:
    """The fragment that a heading gets on the usual hosts."""
    kept = re.sub(r"[^\w\- ]", "", heading.lower())
    return kept.strip().replace(" ", "-")
