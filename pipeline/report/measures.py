"""Measures as people read them: heading, unit and direction of every metric, written down once.

The files that `evaluate` writes hold plain numbers; here they become "84.3%" or "12.07", and which
way is better is known.
"""

from dataclasses import dataclass

from pipeline.report import words
from pipeline.report.words import Number
from pipeline.tasks import generates, models_language


@dataclass(frozen=True, slots=True)
class Measure:
    """One metric as a column.

    Attributes:
        key: Its name in a metrics file, without the split.
        heading: What stands above the column.
        digits: Decimals shown.
        is_percent: Whether a share of one is shown in percent.
        is_lower_better: Whether less is better.
        short: The heading in the terminal; by default the same.
    """

    key: str
    heading: str
    digits: int = 1
    is_percent: bool = True
    is_lower_better: bool = False
    short: str = ""

    def show(self, value: Number | None) -> str:
        """A value with its unit."""
        if self.is_percent and self.digits == 1:
            return words.percent(value)
        return words.number(value, self.digits)

    def bounds(self, interval: tuple[Number, Number] | None) -> str:
        """An interval in brackets, in the column's unit but without it; empty where unknown."""
        if interval is None:
            return ""
        factor = 100 if self.is_percent else 1
        low, high = (words.number(factor * bound, self.digits) for bound in interval)
        return f"[{low}, {high}]"

    def difference(self, value: Number) -> str:
        """A signed difference, of percentages in points."""
        factor = 100 if self.is_percent else 1
        text = words.number(factor * value, self.digits)
        return text if value <= 0 else f"+{text}"


@dataclass(frozen=True, slots=True)
class Group:
    """Measures that stand in one table.

    Attributes:
        title: What the table is about.
        note: How to read it.
        measures: Its columns, in order.
        against_teacher: Whether the values are those against the teacher's own output.
    """

    title: str
    note: str
    measures: tuple[Measure, ...]
    against_teacher: bool = False


def _plain(key: str, heading: str, digits: int, short: str = "", *, less: bool = False) -> Measure:
    return Measure(key, heading, digits, is_percent=False, is_lower_better=less, short=short)


MEASURES = {
    measure.key: measure
    for measure in (
        _plain("perplexity", "perplexity", 2, "ppl", less=True),
        _plain("perplexity_per_word", "perplexity a word", 2, "ppl a\nword", less=True),
        _plain("perplexity_per_byte", "perplexity a byte", 3, "ppl a\nbyte", less=True),
        _plain("bits_per_byte", "bits a byte", 3, "bits a\nbyte", less=True),
        _plain("nats_per_token", "nats a token", 3, "nats", less=True),
        Measure("accuracy", "accuracy"),
        Measure("f1", "F1"),
        Measure("f1_macro", "macro F1", short="macro\nF1"),
        _plain("matthews", "Matthews", 3),
        Measure("accuracy_f1", "accuracy and F1", short="accuracy\nand F1"),
        Measure("ece", "calibration error", is_lower_better=True, short="ECE"),
        _plain("pearson", "Pearson", 3),
        _plain("spearman", "Spearman", 3),
        _plain("pearson_spearman", "Pearson and Spearman", 3, "Pearson,\nSpearman"),
        _plain("mse", "squared error", 3, "MSE", less=True),
        _plain("bleu", "BLEU", 1),
        _plain("chrf", "chrF", 1),
        Measure("rouge1", "ROUGE-1"),
        Measure("rouge2", "ROUGE-2"),
        Measure("rougeL", "ROUGE-L"),
        Measure("cer", "CER", is_lower_better=True),
        Measure("wer", "WER", is_lower_better=True),
        Measure("exact_match", "exact match", short="exact"),
    )
}
MULTI_LABEL = {
    "accuracy": Measure("accuracy", "exact sets", short="exact"),
    "f1": Measure("f1", "micro F1", short="micro\nF1"),
}
LANGUAGE = (
    "perplexity",
    "perplexity_per_word",
    "perplexity_per_byte",
    "bits_per_byte",
    "nats_per_token",
)
TEXT = ("bleu", "chrf", "rouge1", "rouge2", "rougeL", "cer", "wer", "exact_match")
SEQUENCE = {
    "classification": ("accuracy", "f1", "matthews", "ece"),
    "multi-label": ("accuracy", "f1", "f1_macro", "ece"),
    "regression": ("pearson", "spearman", "mse"),
}
HEADLINE = {"classification": "accuracy", "multi-label": "f1", "regression": "pearson"}
"""What is headlined where a metrics file does not say; perplexity for a language model."""

# In the terminal, beside the headline; what is not measured or has no room is left out.
SHORTLIST = {
    "causal-lm": ("bits_per_byte", "perplexity_per_word"),
    "prompt-target": ("bleu", "rougeL", "cer", "perplexity"),
    "messages": ("bleu", "rougeL", "cer", "perplexity"),
    "classification": ("accuracy", "f1", "matthews", "ece"),
    "multi-label": ("f1", "f1_macro", "accuracy", "ece"),
    "regression": ("pearson", "spearman", "mse"),
}


PER_BYTE = {"perplexity": "perplexity_per_byte", "nats_per_token": "bits_per_byte"}
"""What compares in the place of a measure a token, where models count different tokens."""


def headline_of(task: str) -> str:
    """Return the metric that a task is judged by where nothing else is said."""
    return "perplexity" if models_language(task) else HEADLINE[task]


def measure_of(key: str, task: str, *, is_lower_better: bool | None = None) -> Measure:
    """Return a metric as a column; one that is not known here is shown as a plain number.

    Args:
        key: The metric, as `accuracy`.
        task: What the models do; multi-label has words of its own.
        is_lower_better: What the metrics file says of the direction, which counts.
    """
    known = MULTI_LABEL.get(key) if task == "multi-label" else None
    known = known or MEASURES.get(key)
    if known is None:
        return _plain(key, key.replace("_", " "), 3, less=bool(is_lower_better))
    return known


def groups_of(task: str) -> list[Group]:
    """Return the tables of a task's measures."""
    if not models_language(task):
        measures = tuple(measure_of(key, task) for key in SEQUENCE[task])
        # Guo et al., arXiv 1706.04599.
        note = (
            "The calibration error is the mean distance between how sure a model is and how often "
            "it is right, over bins of confidence."
        )
        return [Group("Measures", note if "ece" in SEQUENCE[task] else "", measures)]
    language = Group(
        "Language modelling",
        "Perplexity a token depends on the tokenizer; a word and a byte are the same for all.",
        tuple(MEASURES[key] for key in LANGUAGE),
    )
    if not generates(task):
        return [language]
    text = tuple(MEASURES[key] for key in TEXT)
    return [
        Group(
            "Generated text against the references",
            "BLEU and chrF from 0 to 100. CER and WER are edits over the reference's length, less "
            "is better; they may pass 100%.",
            text,
        ),
        Group(
            "Generated text against the teacher's own",
            "The same measures with the teacher's text as the reference: how much a student "
            "writes like its teacher.",
            text,
            against_teacher=True,
        ),
        language,
    ]
