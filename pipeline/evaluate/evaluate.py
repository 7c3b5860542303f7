"""Everything measured of one model alone: its quality on the splits and its cost.

Agreement with a teacher needs the store and is measured elsewhere; no teacher is loaded here.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.corpus.examples import Split
from pipeline.corpus.tokens import TokenSet
from pipeline.errors import IncompatibleError
from pipeline.evaluate.classification import classify
from pipeline.evaluate.cost import cost_metrics, measure_speed
from pipeline.evaluate.perplexity import perplexity
from pipeline.tasks import models_language

logger = logging.getLogger(__name__)


def evaluate_model(
    model: PreTrainedModel,
    tokens: TokenSet,
    *,
    batch_tokens: int,
    splits: Sequence[Split] = ("validation", "test"),
    device: torch.device,
    directory: Path | None = None,
    timing_batch: int = 8,
    timing_length: int = 128,
    timing_repeats: int = 5,
) -> dict[str, Any]:
    """Measure a model's quality and cost.

    The model is moved to `device` and left in evaluation mode.

    Args:
        model: A causal language model or a sequence classifier, as the tokens' task says.
        tokens: The tokenized corpus.
        batch_tokens: Largest rows times longest row of a batch.
        splits: Splits to score, by name.
        device: Where to run.
        directory: The model's Hugging Face directory, for its bytes on disk.
        timing_batch: Sequences in the batch that is timed.
        timing_length: Tokens of a timed sequence, cut to the corpus's longest.
        timing_repeats: Timed passes; the median counts.

    Returns:
        For each split `<split>_perplexity` and `<split>_nats_per_token`, or `<split>_accuracy`,
        `<split>_f1` and `<split>_matthews`; what `cost_metrics` returns; and `task`.

    Raises:
        ConfigError: If a split has nothing to score.
        IncompatibleError: If the model's vocabulary is smaller than the tokens'.
        IntegrityError: If the model's output is not finite.
    """
    meta = tokens.meta
    vocab = model.config.get_text_config().vocab_size
    if vocab < meta.vocab:
        raise IncompatibleError(
            f"model: found a vocabulary of {vocab}, expected at least the tokens' {meta.vocab}; "
            "evaluate the model on tokens of its own tokenizer"
        )
    model = model.to(device).eval()  # pyright: ignore[reportCallIssue, reportArgumentType]
    metrics: dict[str, Any] = {"task": meta.task}
    for split in splits:
        if models_language(meta.task):
            found = perplexity(
                model,
                tokens.split(split),
                pad_id=meta.pad_id,
                batch_tokens=batch_tokens,
                device=device,
                label=split,
            )
            metrics[f"{split}_nats_per_token"] = found.nats_per_token
            metrics[f"{split}_perplexity"] = found.perplexity
        else:
            scores = classify(
                model,
                tokens.split(split),
                classes=len(meta.classes),
                pad_id=meta.pad_id,
                batch_tokens=batch_tokens,
                device=device,
                label=split,
            )
            metrics[f"{split}_accuracy"] = scores.accuracy
            metrics[f"{split}_f1"] = scores.f1
            metrics[f"{split}_matthews"] = scores.matthews
        logger.info("%s: %s", split, {k: v for k, v in metrics.items() if k.startswith(split)})
    timing = measure_speed(
        model,
        device=device,
        batch=timing_batch,
        length=min(timing_length, meta.max_length),
        repeats=timing_repeats,
    )
    return metrics | cost_metrics(model, directory=directory, timing=timing)
