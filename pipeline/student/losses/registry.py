"""The names of losses in `params.yaml`, one table for each term. A new loss: one file, one name."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.student.losses import divergences
from pipeline.student.losses.attention_head_mean import attention_head_mean
from pipeline.student.losses.attention_kl import attention_kl
from pipeline.student.losses.binary_kl import binary_kl
from pipeline.student.losses.divergences import over_logits, over_topk
from pipeline.student.losses.feature_cosine import feature_cosine
from pipeline.student.losses.feature_mse import feature_mse
from pipeline.student.losses.feature_pkd import feature_pkd
from pipeline.student.losses.forward_kl import forward_kl
from pipeline.student.losses.forward_kl_topk import forward_kl_topk
from pipeline.student.losses.label_bce import label_bce
from pipeline.student.losses.label_mse import label_mse
from pipeline.student.losses.labels import label_cross_entropy
from pipeline.student.losses.logits_mse import logits_mse
from pipeline.student.losses.sampled_cross_entropy import sampled_cross_entropy

Loss = Callable[..., Tensor]
Entry = TypeVar("Entry")


class OutputLoss(NamedTuple):
    """One loss of outputs, in the versions that the forms of logits need.

    Attributes:
        full: From teacher logits over all classes (forms `head` and `dense`).
        topk: From the top-k and its log-normaliser (form `topk`); None if undefined there.
        sampled: From drawn ids (form `sampled`); None if undefined there.
        skews: Whether they take the option `skew`.
    """

    full: Loss
    topk: Loss | None
    sampled: Loss | None = None
    skews: bool = False


def _divergence(found: divergences.Divergence, *, skews: bool = False) -> OutputLoss:
    return OutputLoss(full=over_logits(found), topk=over_topk(found), skews=skews)


FEATURE: dict[str, Loss] = {"mse": feature_mse, "cosine": feature_cosine, "pkd": feature_pkd}
ATTENTION: dict[str, Loss] = {
    "kl": attention_kl,
    "head_mean": attention_head_mean,
    "relations": attention_kl,
}
"""Of log-maps: those of attention, or with `relations` of `relation_vectors`."""
OUTPUT: dict[str, OutputLoss] = {
    "forward_kl": OutputLoss(forward_kl, forward_kl_topk, sampled_cross_entropy),
    "reverse_kl": _divergence(divergences.reverse_kl),
    "jsd": _divergence(divergences.jsd),
    "tvd": _divergence(divergences.tvd),
    "skew_forward_kl": _divergence(divergences.skew_forward_kl, skews=True),
    "skew_reverse_kl": _divergence(divergences.skew_reverse_kl, skews=True),
    "mse": OutputLoss(logits_mse, None),
    "binary_kl": OutputLoss(binary_kl, None),
}
LABELS: dict[str, Loss] = {"multi-label": label_bce, "regression": label_mse}
"""By task; every other has `label_cross_entropy`."""


def label_loss(task: str) -> Loss:
    """Return the loss of true labels that a task's labels have."""
    return LABELS.get(task, label_cross_entropy)


def find_loss(table: Mapping[str, Entry], name: str, *, key: str) -> Entry:
    """Return the loss called `name`.

    Args:
        table: One of the tables of this module.
        name: As in `params.yaml`.
        key: Where the name stands, for the message.

    Raises:
        ConfigError: If there is no such loss.
    """
    try:
        return table[name]
    except KeyError:
        known = ", ".join(sorted(table))
        raise ConfigError(f"{key}: {name!r} is no loss of this term; use one of: {known}") from None
