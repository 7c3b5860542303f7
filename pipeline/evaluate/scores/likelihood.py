"""Perplexity a token, a word and a byte, as functions of counts.

A token is whatever a tokenizer makes; words and bytes are the text's own, so models with different
tokenizers compare by them and by nothing else.
"""

import math

import numpy as np

from pipeline.evaluate.scores.measure import Floats, Metric, OfSums, divide, quotient

# The exponential of more is no float64.
MAX_NATS = 700.0


def likelihood_metrics(
    nats: Floats, targets: Floats, words: Floats | None, text_bytes: Floats | None
) -> dict[str, Metric]:
    """Return `perplexity` and `nats_per_token`, and where known, those of a word and a byte.

    Args:
        nats: Negative log-likelihood of each row's targets.
        targets: Tokens that each row predicts.
        words: Whitespace-separated words that those stand for; None where not known.
        text_bytes: UTF-8 bytes that they stand for; None where not known.

    Returns:
        Also `perplexity_per_word`, `perplexity_per_byte` and `bits_per_byte`.
    """
    metrics: dict[str, Metric] = {
        "nats_per_token": quotient(nats, targets),
        "perplexity": _perplexity(nats, targets),
    }
    if words is not None and words.any():
        metrics["perplexity_per_word"] = _perplexity(nats, words)
    if text_bytes is not None and text_bytes.any():
        metrics["perplexity_per_byte"] = _perplexity(nats, text_bytes)
        metrics["bits_per_byte"] = quotient(nats / math.log(2), text_bytes)
    return metrics


def _perplexity(nats: Floats, units: Floats) -> OfSums:
    return OfSums(
        np.stack([nats, units], axis=1),
        lambda sums: np.exp(np.minimum(divide(sums[:, 0], sums[:, 1]), MAX_NATS)),
    )
