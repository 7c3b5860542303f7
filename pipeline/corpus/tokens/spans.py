"""The text of each token in bytes and words, so that scores of different tokenizers compare.

A tokenizer's offsets leave characters out (spaces it trims, marks it drops) and count others twice
(bytes of one character in two tokens). Here every character belongs to exactly one token.
"""

import re

import numpy as np
from jaxtyping import Int
from numpy import ndarray

_WORD_START = re.compile(r"(?<!\S)\S")


def ends_of(offsets: Int[ndarray, "tokens 2"], length: int) -> Int[ndarray, " tokens"]:
    """Return where each token's text ends; it begins where the previous token's text ends.

    Text between two tokens belongs to the second, text after the last token to that one. A token
    without text, such as an end-of-text token, ends where it begins.

    Args:
        offsets: Start and end of each token in characters, as a fast tokenizer gives them.
        length: Characters of the text.
    """
    ends = np.maximum.accumulate(offsets[:, 1]) if len(offsets) else offsets[:, 1]
    written = np.flatnonzero(offsets[:, 1] > offsets[:, 0])
    if len(written):
        ends = ends.copy()
        ends[written[-1] :] = length
    return ends


def sizes_of(
    text: str, ends: Int[ndarray, " tokens"]
) -> tuple[Int[ndarray, " tokens"], Int[ndarray, " tokens"]]:
    """Return UTF-8 bytes and words of each token's text; a word counts where it begins.

    Guarantee: where the last token ends with the text, both sum to those of the text.
    """
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    widths = 1 + (codes > 0x7F).astype(np.int64) + (codes > 0x7FF) + (codes > 0xFFFF)
    begins = np.zeros(len(codes), np.int64)
    begins[[match.start() for match in _WORD_START.finditer(text)]] = 1
    edges = np.concatenate([[0], ends]).astype(np.int64)
    found = []
    for counts in (widths, begins):
        total = np.concatenate([[0], np.cumsum(counts)])
        found.append(np.diff(total[edges]))
    return found[0], found[1]
