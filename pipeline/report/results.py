"""The input of a report: typed views of the JSON and CSV files that other stages wrote.

Unknown keys pass through, so a new metric reaches `metrics.json` without a change here.
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.errors import IntegrityError
from pipeline.provenance import read_json
from pipeline.scores.likelihood import Likelihood
from pipeline.scores.registry import scores_of
from pipeline.tasks import Task
from pipeline.written_by import remedy

Model = TypeVar("Model", bound=BaseModel)
KINDS = ("hidden", "attention", "value", "logits")
SAME_ANSWER = {
    "classification": "answers one class",
    "multi-label": "answers one set",
    "regression": "answers one number",
}
"""What a model does that gives every test row the same answer; in generation, `writes one text`."""


class Agreement(BaseModel):
    """How close a student's output is to its teacher's on the test split.

    Attributes:
        kl: Mean Kullback-Leibler divergence from teacher to student, in nats.
        top1: Fraction of positions where both have the same most probable token or class.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    kl: float
    top1: float


class UsedSignal(BaseModel):
    """A signal that a student was trained from or compared with."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    store: str
    signal: str
    digest: str


class Timing(BaseModel):
    """How a speed was measured.

    Attributes:
        batch: Sequences of a pass.
        length: Tokens of a sequence.
        repeats: Passes.
        device: Kind of device.
        threads: CPU threads.
        slowest: Tokens per second of the slowest pass.
        fastest: Tokens per second of the fastest pass.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    batch: int
    length: int
    repeats: int
    device: str
    threads: int
    slowest: float | None = None
    fastest: float | None = None


class ModelMetrics(BaseModel):
    """One model's metrics file; metrics that its task does not have are None.

    Attributes:
        score: The metric it is judged by; None if the file has none.
        test_score: The value of that metric.
        test_chance: The score of the best constant answer; None if the file has none.
        test_cut_rows: Number of test rows that were truncated to the model's positions.
        vocab: Size of a language model's vocabulary; None if the file has none.
        test_intervals: Lower and upper end of a metric's confidence interval.
        against_teacher: Measures of generated text with the teacher's as the reference.
        signatures: How sacrebleu computed a measure, in its own words.
        generated_rows: Test rows that text was generated for.
        is_constant: Whether it gives every test row the same answer.
        trained_from: The signals that a student was trained from; empty if the file has none.
        compared_with: The teacher's logits that its agreement was measured with.
    """

    model_config = ConfigDict(frozen=True, extra="allow", allow_inf_nan=False)

    name: str
    task: Task
    teacher: str | None = None
    score: str | None = None
    lower_is_better: bool | None = None
    test_score: float | None = None
    test_chance: float | None = None
    test_cut_rows: int | None = None
    vocab: int | None = None
    classes: int | None = None
    test_intervals: dict[str, tuple[float, float]] = Field(default_factory=dict)
    against_teacher: dict[str, float] = Field(default_factory=dict)
    signatures: dict[str, str] = Field(default_factory=dict)
    is_constant: bool = False
    trained_from: tuple[UsedSignal, ...] = ()
    compared_with: tuple[UsedSignal, ...] = ()
    generated_rows: int | None = None
    test_perplexity: float | None = None
    test_nats_per_token: float | None = None
    validation_perplexity: float | None = None
    test_accuracy: float | None = None
    test_f1: float | None = None
    test_matthews: float | None = None
    validation_accuracy: float | None = None
    agreement: Agreement | None = None
    parameters: int | None = None
    parameters_without_embeddings: int | None = None
    bytes_on_disk: int | None = None
    tokens_per_second: float | None = None
    latency_seconds: float | None = None
    timing: Timing | None = None

    def test(self, metric: str) -> float | None:
        """Return a metric of the test split; None if it was not measured."""
        value = getattr(self, f"test_{metric}", None)
        if value is None and metric == self.score:
            value = self.test_score
        return float(value) if isinstance(value, float | int) else None

    @property
    def tokens_per_byte(self) -> float | None:
        """Tokens per byte of the test rows; None if unknown."""
        bits, nats = self.test("bits_per_byte"), self.test("nats_per_token")
        return bits * math.log(2) / nats if bits and nats else None

    @property
    def at_chance(self) -> str:
        """Why its score is not significantly better than a constant answer's; empty if it is."""
        value = None if self.score is None else self.test(self.score)
        is_likelihood = (
            self.score is not None
            and self.score in (known := scores_of(self.task))
            and known[self.score].answers is Likelihood
        )
        if self.is_constant and not is_likelihood:
            return SAME_ANSWER.get(self.task, "writes one text")
        if self.score is None or value is None or self.test_chance is None:
            return ""
        if self.score not in self.test_intervals and not is_likelihood:
            # Two rows correlate by 1 or -1, whatever a model says.
            return "too few rows"
        low, high = self.test_intervals.get(self.score, (value, value))
        is_above = high < self.test_chance if self.lower_is_better else low > self.test_chance
        return "" if is_above else "at chance"


class SignalResult(BaseModel):
    """One captured signal, from its manifest and the store.

    Attributes:
        tokens: Number of tokens that have it, over all its splits.
        bytes: Its compressed size in the store.
        splits: The splits it was captured for; empty if unknown.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    signal: str
    form: str
    digest: str
    tokens: int = Field(ge=0)
    bytes: int = Field(ge=0)
    segments: int = Field(ge=0)
    store: str
    splits: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """The signal without the hash of its options: `hidden/3/bfloat16`."""
        head, _, last = self.signal.rpartition("/")
        return f"{head}/{last.rsplit('-', 1)[0]}" if head else self.signal

    @property
    def bytes_per_token(self) -> float | None:
        """Bytes in the store for each captured token, or None where none was captured."""
        return self.bytes / self.tokens if self.tokens else None


class CorpusSummary(BaseModel):
    """What a report needs of `corpus.json`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    task: Task
    classes: tuple[str, ...] = ()
    rows: dict[str, int]
    text_bytes: dict[str, int] = Field(default_factory=dict)
    source: dict[str, Any] = Field(default_factory=dict)
    digest: str


class TokensSummary(BaseModel):
    """What a report needs of `tokens.json`."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    vocab: int
    max_length: int
    rows: dict[str, int]
    tokens: dict[str, int]
    digest: str
    tokenizer_digest: str = ""


class TransferSummary(BaseModel):
    """What a report needs of `transfer.json`.

    Attributes:
        targets: Whether corpus or teacher wrote the targets.
        rows: Number of training rows whose targets the teacher generated.
        new_tokens: Number of tokens it generated.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    targets: Literal["corpus", "teacher"]
    rows: int = 0
    new_tokens: int = 0


class Curve(BaseModel):
    """One student's training curve: one column per term with a weight.

    Attributes:
        step: Optimizer step of each row.
        terms: Values of each column but step and epoch, by name; None where a cell is empty.
    """

    model_config = ConfigDict(frozen=True)

    step: tuple[int, ...]
    terms: dict[str, tuple[float | None, ...]]


class TeacherResult(BaseModel):
    """A teacher with its tokens and captured signals.

    Attributes:
        transfer: Whose targets were captured; None if unknown.
        fingerprint: The fingerprint of its store; empty if nothing was captured.
    """

    model_config = ConfigDict(frozen=True)

    name: str
    metrics: ModelMetrics
    tokens: TokensSummary | None = None
    transfer: TransferSummary | None = None
    signals: tuple[SignalResult, ...] = ()
    fingerprint: str = ""

    @property
    def stored_bytes_per_token(self) -> float:
        """Bytes that a token carrying every signal takes.

        Not all bytes over all tokens: hidden states and attention are kept for training alone,
        logits for every split.
        """
        return sum(signal.bytes_per_token or 0.0 for signal in self.signals)


class StudentResult(BaseModel):
    """A student with its curve and its section of the parameters, where there are any."""

    model_config = ConfigDict(frozen=True)

    name: str
    teacher: str
    metrics: ModelMetrics
    curve: Curve | None = None
    section: dict[str, Any] = Field(default_factory=dict)


def load_teacher(
    name: str,
    *,
    metrics: Path,
    tokens: Path | None = None,
    transfer: Path | None = None,
    manifests: Path | None = None,
) -> TeacherResult:
    """Collect a teacher's files.

    Args:
        name: The teacher's name.
        metrics: Its metrics file.
        tokens: Its `tokens.json`.
        transfer: Its `transfer.json`.
        manifests: The folder with one manifest a signal, at any depth.

    Raises:
        IntegrityError: If a file is missing or not what its stage writes.
    """
    signals = []
    if manifests is not None:
        signals = [_validate(SignalResult, path) for path in sorted(manifests.rglob("*.json"))]
    return TeacherResult(
        name=name,
        metrics=load_metrics(metrics, name),
        tokens=None if tokens is None else _validate(TokensSummary, tokens),
        transfer=None if transfer is None else _validate(TransferSummary, transfer),
        signals=in_order(signals),
    )


def in_order(signals: Iterable[SignalResult]) -> tuple[SignalResult, ...]:
    """Return signals in the order hidden, attention, value, logits; layers ascending."""
    return tuple(sorted(signals, key=lambda signal: _natural(signal.signal)))


def labels(signals: Sequence[SignalResult]) -> list[str]:
    """Return short names, and full ones for signals that differ only in a form's options."""
    short = [signal.label for signal in signals]
    return [signal.signal if short.count(signal.label) > 1 else signal.label for signal in signals]


def load_student(
    name: str,
    *,
    teacher: str,
    metrics: Path,
    curve: Path | None = None,
    section: dict[str, Any] | None = None,
) -> StudentResult:
    """Collect a student's files; a curve that does not exist is left out of the plots.

    Args:
        name: The student's name.
        teacher: Its teacher's.
        metrics: Its metrics file.
        curve: Its training curve.
        section: Its section of the parameters, to say what it is.

    Raises:
        IntegrityError: If a file is not what its stage writes.
    """
    return StudentResult(
        name=name,
        teacher=teacher,
        metrics=load_metrics(metrics, name),
        curve=load_curve(curve) if curve is not None and curve.exists() else None,
        section=section or {},
    )


def load_metrics(path: Path, name: str) -> ModelMetrics:
    """Read a model's metrics file.

    Args:
        path: The file.
        name: The model's name, for files that do not say.

    Raises:
        IntegrityError: If it is missing or not what its stage writes.
    """
    return _validate(ModelMetrics, path, name=name)


def load_signal(path: Path) -> SignalResult:
    """Read a signal's manifest; its bytes, which only the store knows, are 0.

    Raises:
        IntegrityError: If it is missing or not what capture writes.
    """
    return _validate(SignalResult, path, bytes=0)


def load_corpus(path: Path) -> CorpusSummary:
    """Read `corpus.json`.

    Raises:
        IntegrityError: If it is missing or not what prepare writes.
    """
    return _validate(CorpusSummary, path)


def load_curve(path: Path) -> Curve:
    """Read a training curve; an empty cell is a step at which a term was not logged.

    Raises:
        IntegrityError: If the file has no `step` column or a cell is no number.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows = list(reader)
            names = list(reader.fieldnames or [])
    except OSError as error:
        raise IntegrityError(f"{path}: not readable ({error.strerror}); {remedy(path)}") from error
    if "step" not in names:
        found = ", ".join(names) or "none"
        raise IntegrityError(
            f"{path}: found columns {found}, expected step among them; {remedy(path)}"
        )
    terms = [name for name in names if name not in {"step", "epoch"}]
    try:
        return Curve(
            step=tuple(int(float(row["step"])) for row in rows),
            terms={name: tuple(_cell(row[name]) for row in rows) for name in terms},
        )
    except (TypeError, ValueError) as error:
        raise IntegrityError(f"{path}: a cell is no number ({error}); {remedy(path)}") from error


def _cell(text: str | None) -> float | None:
    """Return a number; None for an empty cell and for values that no plot can show."""
    if text is None or not text.strip():
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def _natural(name: str) -> tuple[int, list[tuple[int, str]]]:
    """Sort key: the kind's place, then parts with layer 10 after layer 9."""
    kind, *parts = name.split("/")
    place = KINDS.index(kind) if kind in KINDS else len(KINDS)
    return place, [(int(part), "") if part.isdigit() else (-1, part) for part in [*parts, kind]]


def _validate(kind: type[Model], path: Path, **defaults: Any) -> Model:
    """Read a JSON file as a model, naming file and key when it does not fit.

    A text is no number, were it one of digits, and neither is NaN, whatever the key.
    """
    value = read_json(path)
    if isinstance(value, dict):
        value = defaults | value
    for key, leaf in _leaves(value):
        is_number = isinstance(leaf, int | float) and not isinstance(leaf, bool)
        is_score = issubclass(kind, ModelMetrics) and key.startswith(("test_", "validation_"))
        if (is_score and not is_number) or (is_number and not math.isfinite(leaf)):
            raise IntegrityError(
                f"{path}: {key}: found {leaf!r:.80}, expected a finite number; {remedy(path)}"
            )
    try:
        # As JSON: in its strict sense a list is what a tuple is read from.
        return kind.model_validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"])) or "the whole file"
        raise IntegrityError(
            f"{path}: {key}: {first['msg']}, found {first['input']!r:.80}; {remedy(path)}"
        ) from error


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every leaf value with the keys that lead to it."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from _leaves(item, f"{key}.{name}" if key else str(name))
    elif value is not None:
        yield key, value
