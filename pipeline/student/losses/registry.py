"""The names of losses in `params.yaml`, one table for each term. A new loss: one file, one name."""

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.student.losses.attention_kl import attention_kl
from pipeline.student.losses.feature_mse import feature_mse
from pipeline.student.losses.forward_kl import forward_kl
from pipeline.student.losses.forward_kl_topk import forward_kl_topk

Loss = Callable[..., Tensor]
Entry = TypeVar("Entry")


class OutputLoss(NamedTuple):
    """One divergence of outputs, in the versions that the forms of logits need.

    Attributes:
        full: From teacher logits over all classes (forms `head` and `dense`).
        topk: From the top-k and its log-normaliser (form `topk`); None if undefined there.
    """

    full: Loss
    topk: Loss | None


FEATURE: dict[str, Loss] = {"mse": feature_mse}
ATTENTION: dict[str, Loss] = {"kl": attention_kl}
OUTPUT: dict[str, OutputLoss] = {"forward_kl": OutputLoss(full=forward_kl, topk=forward_kl_topk)}


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
