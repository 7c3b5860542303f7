"""Perplexity of a causal model on one split, in memory that does not grow with the vocabulary.

The head runs over a few rows of hidden states at a time, so `batch x length x vocab` logits never
exist at once. One row is checked first: if `head(last hidden state)` does not equal the model's
logits, they are taken from its forward pass instead.
"""

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

import datasets
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import ConfigError, IntegrityError
from pipeline.evaluate.batches import Batch, batches, pad_flags
from pipeline.scores.likelihood import MAX_NATS

logger = logging.getLogger(__name__)

# 2^24 float32 logits are 64 MiB; log-sum-exp needs about as much again.
CHUNK_LOGITS = 1 << 24
# Two orders of the same float32 sums differ by about 1e-6 of the largest logit; a forgotten scale
# or soft cap by far more.
HEAD_TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True)
class Perplexity:
    """How well a model predicts a split.

    Attributes:
        nats_per_token: Mean negative log-likelihood of the targets, in nats.
        targets: How many tokens were predicted.
        row_nats: Negative log-likelihood of each row's targets, in nats.
        row_targets: How many tokens of each row were predicted.
    """

    nats_per_token: float
    targets: int
    row_nats: tuple[float, ...]
    row_targets: tuple[int, ...]

    @property
    def perplexity(self) -> float:
        """Exponential of the nats per token: the number of equally likely choices."""
        return math.exp(self.nats_per_token)


def perplexity(
    model: PreTrainedModel,
    split: datasets.Dataset,
    *,
    pad_id: int,
    batch_tokens: int,
    device: torch.device,
    label: str = "perplexity",
    chunk_logits: int = CHUNK_LOGITS,
) -> Perplexity:
    """Measure the mean negative log-likelihood of every counted target in a split.

    Position t predicts token t + 1 and counts iff `loss_mask[t + 1]`. Every target weighs the
    same in whatever row it is; padding and batch size change nothing beyond the rounding of the
    forward pass. Sums are kept in float64.

    Args:
        model: A causal language model on `device`, in evaluation mode.
        split: Rows with `input_ids` and `loss_mask`.
        pad_id: Id written into padding; its value changes nothing.
        batch_tokens: Largest rows times longest row of a batch.
        device: Where the model is.
        label: What the progress bar says.
        chunk_logits: Largest number of logits held at once, where the head can run alone.

    Raises:
        ConfigError: If no token of the split counts as a target.
        IntegrityError: If the loss is not finite, or past what a perplexity can express.
    """
    masks: list[list[bool]] = split["loss_mask"][:]
    row_nats = [0.0] * len(masks)
    row_targets = [0] * len(masks)
    score: Callable[[Batch, Tensor], Tensor] | None = None
    with torch.inference_mode():
        for batch in batches(
            split,
            model=model,
            pad_id=pad_id,
            batch_tokens=batch_tokens,
            device=device,
            label=label,
        ):
            if score is None:
                score = _scorer(model, batch, chunk_logits)
            counted = pad_flags([masks[row] for row in batch.rows], device)[:, 1:]
            nats = torch.zeros(counted.shape, dtype=torch.float64, device=device)
            if counted.any():
                nats[counted] = score(batch, counted).double()
            sums, counts = nats.sum(dim=1).tolist(), counted.sum(dim=1).tolist()
            for row, value, count in zip(batch.rows, sums, counts, strict=True):
                row_nats[row] = value
                row_targets[row] = count
    targets = sum(row_targets)
    if targets == 0:
        raise ConfigError(
            f"{label}: found 0 targets in {len(masks)} rows, expected at least 1; "
            "texts need two tokens and a loss_mask that keeps some"
        )
    total = math.fsum(row_nats)
    if not math.isfinite(total):
        row = next(row for row, value in enumerate(row_nats) if not math.isfinite(value))
        raise IntegrityError(
            f"{label}: row {row} has a loss of {row_nats[row]}, expected a finite one; "
            "the model's weights are not finite or its training diverged"
        )
    if total / targets > MAX_NATS:
        raise IntegrityError(
            f"{label}: found {total / targets:.4g} nats a token, expected at most {MAX_NATS}; "
            "the model's training diverged"
        )
    return Perplexity(
        nats_per_token=total / targets,
        targets=targets,
        row_nats=tuple(row_nats),
        row_targets=tuple(row_targets),
    )


def target_nats(
    logits: Float[Tensor, "rows vocab"], targets: Int[Tensor, " rows"]
) -> Float[Tensor, " rows"]:
    """Negative log-likelihood of each target, in nats, computed in float32."""
    return torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none")


def _scorer(
    model: PreTrainedModel, batch: Batch, chunk_logits: int
) -> Callable[[Batch, Tensor], Tensor]:
    """Return the chunked head if it equals the model's output, else the model's own logits."""
    body = model.base_model

    def whole(batch: Batch, counted: Tensor) -> Tensor:
        logits = model(**batch.inputs(), use_cache=False).logits[:, :-1]
        return target_nats(logits[counted], batch.input_ids[:, 1:][counted])

    head = model.get_output_embeddings()
    if head is None or body is model:
        return whole
    project: Callable[[Tensor], Tensor] = head

    def chunked(batch: Batch, counted: Tensor) -> Tensor:
        hidden = body(**batch.inputs(), use_cache=False).last_hidden_state[:, :-1][counted]
        targets = batch.input_ids[:, 1:][counted]
        rows = max(1, chunk_logits // model.config.get_text_config().vocab_size)
        return torch.cat(
            [
                target_nats(project(some), ids)
                for some, ids in zip(hidden.split(rows), targets.split(rows), strict=True)
            ]
        )

    probe = batch.input_ids[:1, : min(16, batch.lengths[0])]
    want = model(input_ids=probe, use_cache=False).logits
    got = project(body(input_ids=probe, use_cache=False).last_hidden_state)
    bound = HEAD_TOLERANCE * max(1.0, float(want.abs().max()))
    if got.shape == want.shape and float((got - want).abs().max()) <= bound:
        return chunked
    logger.info("%s changes its logits after the head: they are held whole", type(model).__name__)
    return whole
