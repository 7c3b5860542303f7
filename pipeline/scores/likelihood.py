"""Scores of a language model's likelihood: perplexity per token, word and byte.

Tokens depend on the tokenizer. Words and bytes are the text's own, so models with different
tokenizers are comparable only per word and per byte.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from pipeline.scores.metric import Floats, OfSums, divide, quotient
from pipeline.scores.score import Answers, Row, Score, column
from pipeline.tasks import LANGUAGE_TASKS

MAX_NATS = 700.0
"""The exponential of a larger number overflows float64."""


@dataclass(frozen=True)
class Likelihood(Answers):
    """How likely a model found the targets of each row.

    Attributes:
        nats: Negative log-likelihood of each row's targets.
        targets: Tokens that each row predicts.
        words: Whitespace-separated words in those tokens; None where unknown.
        text_bytes: UTF-8 bytes in those tokens; None where unknown.
    """

    kind: ClassVar[str] = "likelihood"
    tasks: ClassVar[frozenset[str]] = LANGUAGE_TASKS

    nats: Floats
    targets: Floats
    words: Floats | None = None
    text_bytes: Floats | None = None

    @classmethod
    def of_rows(cls, rows: Sequence[Row], *, classes: int | None, tokenizer: str) -> "Likelihood":
        """Return the likelihood of these rows; words and bytes only if every row has them."""
        words, text_bytes = (
            column(rows, name) if all(name in row for row in rows) else None
            for name in ("words", "bytes")
        )
        return cls(column(rows, "nats"), column(rows, "targets"), words, text_bytes)


def _perplexity(nats: Floats, units: Floats | None) -> OfSums | None:
    if units is None or not units.any():
        return None
    return OfSums(
        np.stack([nats, units], axis=1),
        lambda sums: np.exp(np.minimum(divide(sums[:, 0], sums[:, 1]), MAX_NATS)),
    )


def _bits_per_byte(answers: Likelihood) -> OfSums | None:
    if answers.text_bytes is None or not answers.text_bytes.any():
        return None
    return quotient(answers.nats / math.log(2), answers.text_bytes)


perplexity = Score(
    "perplexity",
    Likelihood,
    lambda answers: _perplexity(answers.nats, answers.targets),
    heading="perplexity",
    short="ppl",
    digits=2,
    lower_is_better=True,
    is_default=True,
    in_terminal=frozenset({"prompt-target", "messages"}),
    across_tokenizers="perplexity_per_byte",
)
bits_per_byte = Score(
    "bits_per_byte",
    Likelihood,
    _bits_per_byte,
    heading="bits a byte",
    short="bits a\nbyte",
    digits=3,
    lower_is_better=True,
    in_terminal=frozenset({"causal-lm"}),
)
perplexity_per_word = Score(
    "perplexity_per_word",
    Likelihood,
    lambda answers: _perplexity(answers.nats, answers.words),
    heading="perplexity a word",
    short="ppl a\nword",
    digits=2,
    lower_is_better=True,
    in_terminal=frozenset({"causal-lm"}),
)
perplexity_per_byte = Score(
    "perplexity_per_byte",
    Likelihood,
    lambda answers: _perplexity(answers.nats, answers.text_bytes),
    heading="perplexity a byte",
    short="ppl a\nbyte",
    digits=3,
    lower_is_better=True,
)
nats_per_token = Score(
    "nats_per_token",
    Likelihood,
    lambda answers: quotient(answers.nats, answers.targets),
    heading="nats a token",
    short="nats",
    digits=3,
    lower_is_better=True,
    across_tokenizers="bits_per_byte",
)
