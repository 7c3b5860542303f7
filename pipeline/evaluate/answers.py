"""A model's predictions for the rows of a split, by task. `predictions` scores them."""

from typing import Any

import datasets
import torch
from transformers import PreTrainedModel

from pipeline.corpus.text.examples import Split
from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.errors import ConfigError
from pipeline.evaluate.outputs import sequence_logits
from pipeline.evaluate.perplexity import perplexity
from pipeline.evaluate.predictions import Row
from pipeline.tasks import models_language, outputs_of


def predict_rows(
    model: PreTrainedModel,
    tokens: TokenSet,
    split: Split,
    *,
    batch_tokens: int,
    device: torch.device,
) -> list[Row]:
    """Return a model's prediction for each row of a split, in the rows' order.

    Args:
        model: A model of the tokens' task on `device`, in evaluation mode.
        tokens: The tokenized corpus.
        split: The split's name.
        batch_tokens: Largest rows times longest row of a batch.
        device: Where the model is.

    Returns:
        For each row `row` and `source_row`; `nats`, `targets` and, where the token set has them,
        `words` and `bytes`; or `label`, `predicted` and `probability`; or `targets` and
        `probabilities`; or `target` and `predicted`.

    Raises:
        ConfigError: If there is nothing to predict, or a label lies outside the classes.
        IncompatibleError: If the model has other outputs than the task.
        IntegrityError: If an output is not finite.
    """
    rows, meta = tokens.split(split), tokens.meta
    running: dict[str, Any] = {
        "pad_id": meta.pad_id,
        "batch_tokens": batch_tokens,
        "device": device,
        "label": split,
    }
    if models_language(meta.task):
        found = perplexity(model, rows, **running)
        nats = list(found.row_nats)
        if "unknown_nats" in rows.column_names:
            nats = [own + more for own, more in zip(nats, rows["unknown_nats"][:], strict=True)]
        columns = {"nats": nats, "targets": list(found.row_targets)}
        for name, column in (("words", "target_words"), ("bytes", "target_bytes")):
            if column in rows.column_names:
                columns[name] = rows[column][:]
    else:
        if meta.task == "classification":
            _check_labels(rows["label"][:], len(meta.classes), split)
        outputs = outputs_of(meta.task, meta.classes)
        columns = _answers(
            meta.task, rows, sequence_logits(model, rows, outputs=outputs, **running)
        )
    columns |= {"row": list(range(len(rows))), "source_row": rows["source_row"][:]}
    return [
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    ]


def _answers(task: str, rows: datasets.Dataset, logits: torch.Tensor) -> dict[str, list[Any]]:
    if task == "regression":
        targets = [float(one) for (one,) in rows["targets"][:]]
        return {"target": targets, "predicted": logits[:, 0].tolist()}
    if task == "multi-label":
        targets = [[int(one) for one in row] for row in rows["targets"][:]]
        return {"targets": targets, "probabilities": logits.sigmoid().tolist()}
    probability, predicted = logits.softmax(dim=-1).max(dim=-1)
    return {
        "label": rows["label"][:],
        "predicted": predicted.tolist(),
        "probability": probability.tolist(),
    }


def _check_labels(labels: list[int], classes: int, split: str) -> None:
    outside = sorted({value for value in labels if not 0 <= value < classes})
    if outside:
        raise ConfigError(
            f"{split}: found label {outside[0]}, expected 0 to {classes - 1}; run prepare again"
        )
