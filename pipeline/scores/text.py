"""Scores of generated text against references, each computed by its well-known package.

The packages count once per row (matched n-grams, edits, an F1), and a score is a function of the
sums of those counts, as the packages compute it. Space at the ends of a text is ignored; nothing
else is changed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from itertools import chain, zip_longest
from typing import Any, ClassVar

import numpy as np
from jiwer import process_characters, process_words
from sacrebleu.metrics.bleu import BLEU
from sacrebleu.metrics.chrf import CHRF

from pipeline.errors import ConfigError
from pipeline.scores.metric import Floats, OfSums, mean
from pipeline.scores.score import Answers, Row, Score
from pipeline.scores.tokenization import AUTO, UnicodeWords, bleu_tokenizer, is_english_script
from pipeline.tasks import GENERATION_TASKS

ROUGE = ("rouge1", "rouge2", "rougeL")
Texts = Sequence[str]
References = Sequence[Sequence[str]]


@dataclass(frozen=True)
class GeneratedText(Answers):
    """Texts that a model wrote, each with references of its own.

    BLEU (sacrebleu, arXiv 1804.08771) matches n-grams of any reference. The other scores use the
    reference that suits a text best: chrF and ROUGE by F, error rates by edits, the first if
    several do.

    Attributes:
        texts: What the model wrote.
        references: What it should have written, at least one per text.
        tokenizer: sacrebleu's for BLEU; `auto` chooses by the script.
        script_of: The texts whose script decides; None for the references.

    Raises:
        ConfigError: If there is no text, or one without a reference.
    """

    kind: ClassVar[str] = "text"
    tasks: ClassVar[frozenset[str]] = GENERATION_TASKS

    texts: Texts
    references: References
    tokenizer: str = AUTO
    script_of: References | None = None

    def __post_init__(self) -> None:
        if not self.texts or not all(self.references):
            raise ConfigError(
                f"scores of text: found {len(self.texts)} texts, "
                f"{sum(not each for each in self.references)} of them without a reference, "
                "expected at least one of each; prepare the corpus again"
            )

    @classmethod
    def of_rows(
        cls, rows: Sequence[Row], *, classes: int | None, tokenizer: str
    ) -> "GeneratedText":
        """Return the texts generated for these rows."""
        return cls(
            [row["text"] for row in rows],
            [row.get("references_as_written", row["references"]) for row in rows],
            tokenizer,
            [row["references"] for row in rows],
        )

    @classmethod
    def answered(cls, rows: Sequence[Row]) -> list[Row]:
        """Return the rows for which text was generated."""
        return [row for row in rows if "text" in row]

    @cached_property
    def stripped(self) -> tuple[Texts, References]:
        """Texts and references without space at their ends."""
        return (
            [text.strip() for text in self.texts],
            [[reference.strip() for reference in some] for some in self.references],
        )

    @cached_property
    def bleu(self) -> "Sacrebleu":
        """BLEU with the tokenizer for the references' script."""
        is_auto = self.tokenizer == AUTO
        tokenizer = bleu_tokenizer(self._script) if is_auto else self.tokenizer
        return _sacrebleu(BLEU(tokenize=tokenizer), *self.stripped)

    @cached_property
    def chrf(self) -> "Sacrebleu":
        """ChrF with sacrebleu's defaults."""
        return _sacrebleu(CHRF(), *self.stripped)

    @cached_property
    def rouge(self) -> Floats:
        """F1 of each kind of ROUGE with the best reference: [texts, kinds].

        rouge-score splits English into words and stems them; `UnicodeWords` splits other text.
        """
        # Takes a second, and a report needs the scores' names alone.
        from rouge_score.rouge_scorer import RougeScorer
        from rouge_score.tokenizers import DefaultTokenizer

        words = DefaultTokenizer(use_stemmer=True) if self._is_english else UnicodeWords()
        scorer = RougeScorer(list(ROUGE), tokenizer=words)
        scores = [scorer.score_multi(some, text) for text, some in zip(*self.stripped, strict=True)]
        return np.array([[each[kind].fmeasure for kind in ROUGE] for each in scores], dtype=float)

    def signatures(self) -> dict[str, str]:
        """Return how `bleu`, `chrf` (in sacrebleu's words) and `rouge` were computed."""
        words = "rouge-score|stem:en" if self._is_english else "unicode|stem:no"
        return {
            "bleu": self.bleu.signature,
            "chrf": self.chrf.signature,
            "rouge": f"tok:{words}|version:{version('rouge-score')}",
        }

    @cached_property
    def _script(self) -> list[str]:
        return list(chain.from_iterable(self.script_of or self.references))

    @cached_property
    def _is_english(self) -> bool:
        return is_english_script(self._script)


@dataclass(frozen=True, slots=True)
class Sacrebleu:
    """A score of sacrebleu and how it was computed, in sacrebleu's words."""

    metric: OfSums
    signature: str


def _sacrebleu(score: BLEU | CHRF, texts: Texts, references: References) -> Sacrebleu:
    """Build a score from sacrebleu's own statistics, as its significance tests use them."""
    # One stream for the first references, one for the second ..., None where a text has no more.
    streams = list(zip_longest(*references))
    rows: Any = score._extract_corpus_statistics(texts, streams)  # pyright: ignore[reportArgumentType]

    def value_of(sums: Floats) -> Floats:
        counts = np.rint(sums).astype(np.int64).tolist()
        return np.array([score._compute_score_from_stats(each).score for each in counts])

    # sacrebleu counts the references, for its signature, while it extracts the statistics.
    return Sacrebleu(OfSums(np.array(rows, dtype=np.float64), value_of), str(score.get_signature()))


def _error_rate(align: Callable[[str, str], Any], answers: GeneratedText) -> OfSums:
    """Edits over the length of what should have been written, with the nearest reference."""
    nearest = [
        min((_edits(align, text, reference) for reference in some), key=lambda edits: edits[0])
        for text, some in zip(*answers.stripped, strict=True)
    ]
    # As jiwer: where nothing should have been written, every insertion is one complete error.
    return OfSums(
        np.array(nearest, dtype=np.float64),
        lambda sums: sums[:, 0] / np.maximum(sums[:, 1], 1.0),
    )


def _edits(align: Callable[[str, str], Any], text: str, reference: str) -> tuple[int, int]:
    """Return the edits between a text and a reference, and the reference's length."""
    alignment = align(reference, text)
    return (
        alignment.substitutions + alignment.deletions + alignment.insertions,
        sum(len(pieces) for pieces in alignment.references),
    )


def _exact_match(answers: GeneratedText) -> OfSums:
    matches = [text in some for text, some in zip(*answers.stripped, strict=True)]
    return mean(np.array(matches, dtype=np.float64))


bleu = Score(
    "bleu",
    GeneratedText,
    lambda answers: answers.bleu.metric,
    heading="BLEU",
    in_terminal=GENERATION_TASKS,
)
chrf = Score("chrf", GeneratedText, lambda answers: answers.chrf.metric, heading="chrF")
rouge1 = Score(
    "rouge1",
    GeneratedText,
    lambda answers: mean(answers.rouge[:, 0]),
    heading="ROUGE-1",
    is_percent=True,
)
rouge2 = Score(
    "rouge2",
    GeneratedText,
    lambda answers: mean(answers.rouge[:, 1]),
    heading="ROUGE-2",
    is_percent=True,
)
rouge_l = Score(
    "rougeL",
    GeneratedText,
    lambda answers: mean(answers.rouge[:, 2]),
    heading="ROUGE-L",
    is_percent=True,
    in_terminal=GENERATION_TASKS,
)
cer = Score(
    "cer",
    GeneratedText,
    lambda answers: _error_rate(process_characters, answers),
    heading="CER",
    is_percent=True,
    lower_is_better=True,
    in_terminal=GENERATION_TASKS,
)
wer = Score(
    "wer",
    GeneratedText,
    lambda answers: _error_rate(process_words, answers),
    heading="WER",
    is_percent=True,
    lower_is_better=True,
)
exact_match = Score(
    "exact_match",
    GeneratedText,
    _exact_match,
    heading="exact match",
    short="exact",
    is_percent=True,
)
