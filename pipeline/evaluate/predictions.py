"""A model's predictions for the test rows as a file, and their scores.

The file has one JSON object per row: `row` and `source_row` identify it, the other keys hold what
was asked and what the model answered. Scores, intervals and paired tests need only these rows, no
model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Required

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

# Pydantic's own requirement, and what it asks for below Python 3.12.
from typing_extensions import TypedDict

from pipeline.errors import IntegrityError
from pipeline.provenance import canonical_json, write_bytes_atomically
from pipeline.scores.metric import Metric
from pipeline.scores.registry import answers_of, metrics_of
from pipeline.scores.score import Row
from pipeline.scores.tokenization import AUTO
from pipeline.written_by import remedy

Number = Annotated[float, Field(allow_inf_nan=False)]


@with_config(ConfigDict(extra="allow", strict=True))
class _Prediction(TypedDict, total=False):
    """A line of a predictions file: the keys whose types the scores rely on."""

    row: Required[int]
    source_row: Required[int]
    nats: Number
    words: int
    bytes: int
    targets: int | list[int]
    label: int
    predicted: int | Number
    probability: Number
    probabilities: list[Number]
    target: Number
    prompt: str
    text: str
    references: list[str]


_PREDICTION = TypeAdapter(_Prediction)
Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Scored:
    """Metrics over the same rows.

    Attributes:
        rows: The rows, in the order of the metrics' counts.
        metrics: Functions of how often each row counts.
        signatures: How metrics were computed, where their package has words for it.
    """

    rows: list[Row]
    metrics: dict[str, Metric]
    signatures: dict[str, str] = field(default_factory=dict)


def score_rows(
    rows: Sequence[Row], task: str, *, classes: int | None = None, tokenizer: str = AUTO
) -> list[Scored]:
    """Return the metrics of a task: of all rows, and of those for which text was generated.

    Args:
        rows: Predictions of one model.
        task: The corpus's task.
        classes: How many classes there are; None for as many as the rows show.
        tokenizer: How BLEU splits text into words.
    """
    scored: list[Scored] = []
    for answers in answers_of(task):
        answered = answers.answered(rows)
        if answered:
            judged = answers.of_rows(answered, classes=classes, tokenizer=tokenizer)
            scored.append(Scored(answered, metrics_of(judged), judged.signatures()))
    return scored


def identity(row: Row) -> Identity:
    """Return the key that joins rows of two models: the row's number in split and corpus."""
    return row["row"], row["source_row"]


def write_predictions(path: Path, rows: Sequence[Row]) -> None:
    """Write rows as JSON lines, atomically; the same rows give the same bytes."""
    write_bytes_atomically(path, b"".join(canonical_json(row) + b"\n" for row in rows))


def read_predictions(path: Path) -> list[Row]:
    """Read what `write_predictions` wrote.

    Raises:
        IntegrityError: If the file is missing or a line of it is not a row.
    """
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError as error:
        raise IntegrityError(f"{path}: missing; {remedy(path)}") from error
    rows: list[Row] = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(dict(_PREDICTION.validate_json(line)))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(map(str, first["loc"])) or "all of it"
            raise IntegrityError(
                f"{path}: line {number} is no prediction: {key}: {first['msg']}, found "
                f"{first['input']!r:.60}; {remedy(path)}"
            ) from error
    return rows
