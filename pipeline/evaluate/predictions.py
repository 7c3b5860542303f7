"""What a model says to each test row, as a file, and the scores of it.

One JSON object a row: `row` and `source_row` say which, the others what was asked and what was
said. Scores, intervals and paired tests need nothing but these rows, and no model.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Required

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError, with_config

# Pydantic's own requirement, and what it asks for below Python 3.12.
from typing_extensions import TypedDict

from pipeline.errors import IntegrityError
from pipeline.evaluate.scores.classification import classification_metrics
from pipeline.evaluate.scores.likelihood import likelihood_metrics
from pipeline.evaluate.scores.measure import Floats, Metric
from pipeline.evaluate.scores.multi_label import multi_label_metrics
from pipeline.evaluate.scores.regression import regression_metrics
from pipeline.evaluate.scores.text_scores import score_texts
from pipeline.evaluate.scores.words import AUTO
from pipeline.provenance import canonical_json, write_bytes_atomically
from pipeline.tasks import models_language
from pipeline.written_by import remedy

Row = dict[str, Any]
Number = Annotated[float, Field(allow_inf_nan=False)]


@with_config(ConfigDict(extra="allow", strict=True))
class _Prediction(TypedDict, total=False):
    """A line of a file of predictions: the keys whose type scores rely on."""

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
        rows: The rows they are over, as counts take them.
        metrics: Functions of how often each of the rows counts.
        signatures: How metrics were computed, where their package says.
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
    everything = list(rows)
    if not models_language(task):
        return [Scored(everything, _sequence_metrics(everything, task, classes))]
    likelihood = likelihood_metrics(
        _column(everything, "nats"),
        _column(everything, "targets"),
        _column(everything, "words") if all("words" in row for row in everything) else None,
        _column(everything, "bytes") if all("bytes" in row for row in everything) else None,
    )
    found = [Scored(everything, likelihood)]
    written = [row for row in everything if "text" in row]
    if written:
        text = score_texts(
            [row["text"] for row in written],
            [row.get("references_as_written", row["references"]) for row in written],
            tokenizer=tokenizer,
            script_of=[row["references"] for row in written],
        )
        found.append(Scored(written, text.metrics, text.signatures))
    return found


def _sequence_metrics(rows: list[Row], task: str, classes: int | None) -> dict[str, Metric]:
    if task == "regression":
        return regression_metrics(_column(rows, "target"), _column(rows, "predicted"))
    if task == "multi-label":
        return multi_label_metrics(_column(rows, "targets"), _column(rows, "probabilities"))
    labels = _column(rows, "label").astype(np.int64)
    predicted = _column(rows, "predicted").astype(np.int64)
    seen = int(max(labels.max(), predicted.max())) + 1
    return classification_metrics(
        labels, predicted, _column(rows, "probability"), classes or max(2, seen)
    )


def _column(rows: Sequence[Row], name: str) -> Floats:
    for row in rows:
        if name not in row:
            raise IntegrityError(
                f"predictions: row {row['row']} has no {name}, expected one in every row; evaluate "
                "the model again"
            )
    return np.array([row[name] for row in rows], dtype=np.float64)


def identity(row: Row) -> Identity:
    """Return what rows of two models are joined by: their place in the split and in the corpus."""
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
