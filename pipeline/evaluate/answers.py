"""A model's predictions for the rows of a split, by task. `predictions` scores them."""

from typing import Any

import datasets
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.corpus.text.examples import Split
from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.errors import ConfigError, IncompatibleError, IntegrityError
from pipeline.evaluate.batches import batches
from pipeline.evaluate.perplexity import perplexity
from pipeline.evaluate.predictions import Row
from pipeline.tasks import models_language, outputs_of


def sequence_logits(
    model: PreTrainedModel,
    split: datasets.Dataset,
    *,
    outputs: int,
    pad_id: int,
    batch_tokens: int,
    device: torch.device,
    label: str = "outputs",
) -> Float[Tensor, "rows outputs"]:
    """Run a sequence model over a split.

    Args:
        model: A sequence model on `device`, in evaluation mode.
        split: Rows with `input_ids`, and `token_type_ids` where the tokenizer makes them.
        outputs: How many numbers the task asks for.
        pad_id: Id written into padding.
        batch_tokens: Largest rows times longest row of a batch.
        device: Where the model is.
        label: What the progress bar says.

    Returns:
        The logits in float64, on the CPU.

    Raises:
        IncompatibleError: If the model has another number of outputs, or another padding id:
            decoders read theirs off the last token that is not padding, by that id.
        ConfigError: If the split is empty.
        IntegrityError: If a logit is not finite.
    """
    own_pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    if own_pad != pad_id:
        raise IncompatibleError(
            f"{label}: the model pads with id {own_pad}, the tokens with {pad_id}, expected the "
            f"same; set pad_token_id to {pad_id} in the model's config.json"
        )
    found = torch.zeros((len(split), outputs), dtype=torch.float64)
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
            if logits.shape[-1] != outputs:
                raise IncompatibleError(
                    f"{label}: the model has {logits.shape[-1]} outputs, the corpus {outputs}, "
                    "expected the same; train the model on this corpus"
                )
            if not torch.isfinite(logits).all():
                raise IntegrityError(
                    f"{label}: a logit of rows {batch.rows[0]}... is not finite, expected finite "
                    "ones; the model's weights are damaged or its training diverged"
                )
            found[list(batch.rows)] = logits.cpu().double()
    return found


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
