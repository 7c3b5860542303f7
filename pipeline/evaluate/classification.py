"""Accuracy, F1 and Matthews correlation of a classifier on one split, by scikit-learn."""

from dataclasses import dataclass

import datasets
import torch
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import PreTrainedModel

from pipeline.errors import ConfigError, IncompatibleError, IntegrityError
from pipeline.evaluate.batches import batches


@dataclass(frozen=True, slots=True)
class ClassificationScores:
    """How well a classifier labels a split; all are fractions of one.

    Attributes:
        accuracy: Share of rows with the right class.
        f1: With two classes, F1 of class 1; with more, the plain mean of every class's F1.
        matthews: Matthews correlation, from -1 to 1; 0 for a classifier that says one class only.
        rows: How many rows were labelled.
    """

    accuracy: float
    f1: float
    matthews: float
    rows: int


def classification_scores(
    labels: list[int], predicted: list[int], classes: int
) -> ClassificationScores:
    """Score predictions against labels.

    Args:
        labels: True class of each row.
        predicted: Class the model says.
        classes: How many classes there are, whether or not all occur.
    """
    average = "binary" if classes == 2 else "macro"
    # F1 of a class that is neither said nor true counts as 0, without a warning.
    f1 = f1_score(
        labels,
        predicted,
        labels=None if classes == 2 else list(range(classes)),
        average=average,
        zero_division=0,  # pyright: ignore[reportArgumentType]  # the stub says str
    )
    return ClassificationScores(
        accuracy=float(accuracy_score(labels, predicted)),
        f1=float(f1),
        matthews=float(matthews_corrcoef(labels, predicted)),
        rows=len(labels),
    )


def classify(
    model: PreTrainedModel,
    split: datasets.Dataset,
    *,
    classes: int,
    pad_id: int,
    batch_tokens: int,
    device: torch.device,
    label: str = "classification",
) -> ClassificationScores:
    """Run a sequence classifier over a split and score its most likely class.

    Args:
        model: A sequence classifier on `device`, in evaluation mode.
        split: Rows with `input_ids`, `label`, and `token_type_ids` where the tokenizer makes them.
        classes: How many classes the task has.
        pad_id: Id written into padding.
        batch_tokens: Largest rows times longest row of a batch.
        device: Where the model is.
        label: What the progress bar says.

    Raises:
        IncompatibleError: If the model has another number of classes, or another padding id:
            decoders read the class off the last token that is not padding, by that id.
        ConfigError: If a label lies outside the classes or the split is empty.
        IntegrityError: If a logit is not finite.
    """
    own_pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    if own_pad != pad_id:
        raise IncompatibleError(
            f"{label}: the model pads with id {own_pad}, the tokens with {pad_id}, expected the "
            f"same; set pad_token_id to {pad_id} in the model's config.json"
        )
    labels: list[int] = split["label"][:]
    outside = sorted({value for value in labels if not 0 <= value < classes})
    if outside:
        raise ConfigError(
            f"{label}: found label {outside[0]}, expected 0 to {classes - 1}; run prepare again"
        )
    predicted = [0] * len(labels)
    with torch.inference_mode():
        for batch in batches(
            split,
            model=model,
            pad_id=pad_id,
            batch_tokens=batch_tokens,
            device=device,
            label=label,
        ):
            logits = model(**batch.inputs()).logits
            if logits.shape[-1] != classes:
                raise IncompatibleError(
                    f"{label}: the model has {logits.shape[-1]} classes, the corpus {classes}, "
                    "expected the same; train the model on this corpus"
                )
            if not torch.isfinite(logits).all():
                raise IntegrityError(
                    f"{label}: a logit of rows {batch.rows[0]}... is not finite, expected finite "
                    "ones; the model's weights are damaged or its training diverged"
                )
            for row, value in zip(batch.rows, logits.argmax(dim=-1).tolist(), strict=True):
                predicted[row] = value
    return classification_scores(labels, predicted, classes)
