"""Near-duplicates: how much of a text already occurs elsewhere, by runs of eight words.

Eight words in the same order are rarely chance in English, and a set of them finds a copied
paragraph inside a longer text whatever was changed around it. Cost: one set entry a word kept.
"""

import re
from collections.abc import Iterable

RUN_WORDS = 8
_WORD = re.compile(r"\w+")


def normalised(text: str) -> str:
    """Reduce a text to its lower-case words, so that spacing, case and marks do not count."""
    return " ".join(_WORD.findall(text.lower()))


def runs(text: str) -> set[int]:
    """Return every run of eight words of a text, each as a number.

    The numbers come from Python's salted `hash`: they serve membership inside one process
    only and must never reach a file. A text of fewer words has no runs.
    """
    words = _WORD.findall(text.lower())
    return {hash(tuple(words[i : i + RUN_WORDS])) for i in range(len(words) - RUN_WORDS + 1)}


def containment(text: str, known: set[int]) -> float:
    """Return the share of a text's runs that are in `known`; 0 for a text without runs."""
    own = runs(text)
    return len(own & known) / len(own) if own else 0.0


def shared_runs(wanted: set[int], texts: Iterable[str]) -> set[int]:
    """Return which of the `wanted` runs occur in any of `texts`.

    Memory stays with the small side: the runs of a large training split are never all held.
    """
    found: set[int] = set()
    for text in texts:
        found |= runs(text) & wanted
    return found


def paragraphs(text: str) -> list[str]:
    """Split a text at blank lines; no paragraph is empty."""
    return [part for part in re.split(r"\n[ \t]*\n", text) if part.strip()]
