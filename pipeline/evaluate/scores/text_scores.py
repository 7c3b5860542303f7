"""Scores of written text against references, each by its own well-known package.

Every package counts once a row (matched n-grams, edits, an F1); a score is a function of the sums
of those counts, as the packages compute it. Text is compared as it is, but for space at its ends.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain, zip_longest
from typing import Any

import numpy as np
from jiwer import process_characters, process_words
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.tokenizers import DefaultTokenizer
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from pipeline.errors import ConfigError
from pipeline.evaluate.scores.measure import Floats, Metric, OfSums, quotient
from pipeline.evaluate.scores.words import AUTO, UnicodeWords, bleu_tokenizer, is_english_script

ROUGE = ("rouge1", "rouge2", "rougeL")


@dataclass(frozen=True, slots=True)
class TextScores:
    """Scores of some texts.

    Attributes:
        metrics: `bleu` and `chrf` (0 to 100), `rouge1`, `rouge2`, `rougeL` and `exact_match` (0
            to 1), `cer` and `wer` (errors a character and a word of the reference; more than 1
            where a text is much too long).
        signatures: How `bleu`, `chrf` (in sacrebleu's words) and `rouge` were computed.
    """

    metrics: dict[str, Metric]
    signatures: dict[str, str]


def score_texts(
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    tokenizer: str = AUTO,
    script_of: Sequence[Sequence[str]] | None = None,
) -> TextScores:
    """Score each text against one or more references of its own.

    BLEU (sacrebleu, arXiv 1804.08771) matches n-grams of any reference; the others take the
    reference a text is best by: chrF and ROUGE by F, error rates by edits, the first if several.
    ROUGE is rouge-score's: of English by words with their endings stemmed, of other text by
    `UnicodeWords`; error rates are jiwer's.

    Args:
        texts: What a model wrote.
        references: What it should have written, at least one a text.
        tokenizer: sacrebleu's for BLEU; auto chooses by the script.
        script_of: The texts whose script decides; None for the references.

    Raises:
        ConfigError: If there is no text, or one without a reference.
    """
    if not texts or not all(references):
        raise ConfigError(
            f"scores of text: found {len(texts)} texts, {sum(not each for each in references)} of "
            "them without a reference, expected at least one of each; prepare the corpus again"
        )
    texts = [text.strip() for text in texts]
    references = [[each.strip() for each in some] for some in references]
    deciding = list(chain.from_iterable(script_of or references))
    name = bleu_tokenizer(deciding) if tokenizer == AUTO else tokenizer
    bleu, chrf = BLEU(tokenize=name), CHRF()
    is_english = is_english_script(deciding)
    words = DefaultTokenizer(use_stemmer=True) if is_english else UnicodeWords()
    rouge = _rouge(texts, references, words)
    ones = np.ones(len(texts))
    exact = np.array([float(text in some) for text, some in zip(texts, references, strict=True)])
    metrics: dict[str, Metric] = {
        "bleu": _sacrebleu(bleu, texts, references),
        "chrf": _sacrebleu(chrf, texts, references),
        **{name: quotient(rouge[:, column], ones) for column, name in enumerate(ROUGE)},
        "cer": _error_rate(process_characters, texts, references),
        "wer": _error_rate(process_words, texts, references),
        "exact_match": quotient(exact, ones),
    }
    signatures = {
        "bleu": str(bleu.get_signature()),
        "chrf": str(chrf.get_signature()),
        "rouge": f"tok:{'rouge-score|stem:en' if is_english else 'unicode|stem:no'}"
        f"|version:{version('rouge-score')}",
    }
    return TextScores(metrics, signatures)


def _sacrebleu(
    score: BLEU | CHRF, texts: Sequence[str], references: Sequence[Sequence[str]]
) -> OfSums:
    """A score of sacrebleu from its own statistics, as its significance tests use them."""
    # One stream for the first references, one for the second ..., None where a text has no more.
    streams = list(zip_longest(*references))
    rows: Any = score._extract_corpus_statistics(texts, streams)  # pyright: ignore[reportArgumentType]

    def value_of(sums: Floats) -> Floats:
        whole = np.rint(sums).astype(np.int64).tolist()
        return np.array([score._compute_score_from_stats(one).score for one in whole])

    return OfSums(np.array(rows, dtype=np.float64), value_of)


def _rouge(
    texts: Sequence[str],
    references: Sequence[Sequence[str]],
    words: DefaultTokenizer | UnicodeWords,
) -> Floats:
    """F1 of each kind of ROUGE with the best reference: [texts, kinds]."""
    scorer = RougeScorer(list(ROUGE), tokenizer=words)
    scores = [scorer.score_multi(some, text) for text, some in zip(texts, references, strict=True)]
    return np.array([[one[kind].fmeasure for kind in ROUGE] for one in scores], dtype=np.float64)


def _error_rate(
    align: Callable[[str, str], Any], texts: Sequence[str], references: Sequence[Sequence[str]]
) -> OfSums:
    """Edits over the length of what should have been written, with the nearest reference."""
    nearest = [
        min((_edits(align, text, one) for one in some), key=lambda found: found[0])
        for text, some in zip(texts, references, strict=True)
    ]
    # As jiwer: where nothing should have been written, every insertion is a whole error.
    return OfSums(
        np.array(nearest, dtype=np.float64),
        lambda sums: sums[:, 0] / np.maximum(sums[:, 1], 1.0),
    )


def _edits(align: Callable[[str, str], Any], text: str, reference: str) -> tuple[int, int]:
    found = align(reference, text)
    return (
        found.substitutions + found.deletions + found.insertions,
        sum(len(pieces) for pieces in found.references),
    )
