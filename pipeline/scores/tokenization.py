"""How scores of text split it into words, by the script that the references are written in.

The choice depends on the references alone, so it is the same for all models that are compared.
"""

import importlib.util
import unicodedata
from collections.abc import Iterable, Sequence

from pipeline.errors import ConfigError

AUTO = "auto"
OFFLINE = ("13a", "intl", "zh", "char", "none")
"""Tokenizers of sacrebleu that need nothing but sacrebleu."""
PACKAGES = {"ja-mecab": ("MeCab", "sacrebleu[ja]"), "ko-mecab": ("mecab_ko", "sacrebleu[ko]")}
"""Tokenizers of sacrebleu that need a module, and what installs it."""
DOWNLOADS = ("spm", "flores101", "flores200", "spBLEU-1K")
"""Tokenizers of sacrebleu that fetch a model when they are first used."""

# First and last code point of scripts that are written without spaces between words.
HAN = ((0x2E80, 0x2FDF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
KANA = ((0x3040, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F))
# Thai, Lao, Tibetan, Myanmar, Khmer.
OTHERS = ((0x0E00, 0x0FFF), (0x1000, 0x109F), (0x1780, 0x17FF))
# More letters that rouge-score would drop than this are not English with a few names.
FOREIGN_SHARE = 0.005


def check_tokenizer(name: str) -> str:
    """Return the name of a BLEU tokenizer that works on this machine without a network.

    Raises:
        ConfigError: If it is unknown, needs a package that is not installed, or a download.
    """
    key = "evaluate.tokenizer"
    if name in PACKAGES:
        module, package = PACKAGES[name]
        if importlib.util.find_spec(module) is None:
            raise ConfigError(
                f"{key}: {name} needs the module {module}, which is not installed; run "
                f"pip install '{package}', or use auto or char"
            )
    elif name in DOWNLOADS:
        raise ConfigError(
            f"{key}: {name} needs the package sentencepiece and downloads a model, expected one "
            f"that works offline; use {AUTO} or one of {', '.join([*OFFLINE, *PACKAGES])}"
        )
    elif name not in (AUTO, *OFFLINE):
        raise ConfigError(
            f"{key}: found {name!r}, expected {AUTO} or one of "
            f"{', '.join([*OFFLINE, *PACKAGES])}; correct it"
        )
    return name


def bleu_tokenizer(references: Iterable[str]) -> str:
    """Return sacrebleu's tokenizer for the script that most letters of the references are in.

    `zh` for Chinese; `char` for Japanese, Thai, Lao, Tibetan, Burmese and Khmer; `13a` for scripts
    with spaces between words.
    """
    letters = [ord(letter) for text in references for letter in text if letter.isalpha()]
    han, kana, others = (
        sum(_is_in(code, ranges) for code in letters) for ranges in (HAN, KANA, OTHERS)
    )
    if 2 * (han + kana + others) <= len(letters):
        return "13a"
    # Japanese is mostly Kana; Chinese has none but in names.
    return "zh" if han > 9 * (kana + others) else "char"


def is_english_script(references: Iterable[str]) -> bool:
    """Tell whether rouge-score, which drops all but a to z and digits, sees the references."""
    letters = [letter for text in references for letter in text if letter.isalnum()]
    return sum(not letter.isascii() for letter in letters) <= FOREIGN_SHARE * len(letters)


class UnicodeWords:
    """Words of any script, lower-cased, not stemmed, as a tokenizer for rouge-score.

    A word is a run of letters, marks and digits; in scripts without spaces each letter is one.
    """

    def tokenize(self, text: str) -> Sequence[str]:
        """Return the words of a text."""
        found: list[str] = []
        goes_on = False
        for letter in text.lower():
            kind = unicodedata.category(letter)[0]
            alone = _is_in(ord(letter), (*HAN, *KANA, *OTHERS))
            if kind not in "LMN":
                goes_on = False
            elif found and (kind == "M" or (goes_on and not alone)):
                found[-1] += letter
            else:
                found.append(letter)
                goes_on = not alone
        return found


def _is_in(code: int, ranges: Iterable[tuple[int, int]]) -> bool:
    return any(first <= code <= last for first, last in ranges)
