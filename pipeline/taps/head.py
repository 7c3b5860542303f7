"""The output head as numbers: one matrix, a bias, a scale and a soft cap, applied by one function.

With it the whole vocabulary's logits follow from the head's input alone, without the model.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.taps.weights import plain_weights


@dataclass(frozen=True)
class HeadSpec:
    """What a head does beside its matrix: logits = cap(scale · (x Wᵀ + bias)).

    With a soft cap c, cap(z) = c · tanh(z / c); without, cap(z) = z.
    """

    bias: bool
    scale: float = 1.0
    softcap: float | None = None


def linear_head(model: PreTrainedModel) -> nn.Linear:
    """Return the model's output embedding.

    Raises:
        IncompatibleError: If it has none that is linear.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        found = "no output embedding" if head is None else f"a {type(head).__name__} as its head"
        raise IncompatibleError(
            f"{type(model).__name__} has {found}, expected a linear lm_head; leave the head out "
            "and keep its logits in another form"
        )
    return head


def head_parameters(
    model: PreTrainedModel,
) -> tuple[Float[Tensor, "vocab d"], Float[Tensor, " vocab"] | None]:
    """Return weight and bias of the model's output embedding; copied only if it was offloaded.

    Raises:
        IncompatibleError: If the model has no linear output embedding.
    """
    found = plain_weights(linear_head(model))
    return found["weight"], found.get("bias")


def read_head_spec(model: PreTrainedModel) -> HeadSpec:
    """Read bias, scale and soft cap of a model's head: by name, so `check_taps` proves them.

    Raises:
        IncompatibleError: If the model has no linear output embedding.
    """
    bias = linear_head(model).bias
    config = model.config.get_text_config()
    # Cohere and Falcon-H1 multiply, Granite divides.
    scale = (getattr(config, "logit_scale", None) or 1.0) * (
        getattr(config, "lm_head_multiplier", None) or 1.0
    )
    scale /= getattr(config, "logits_scaling", None) or 1.0
    softcap = getattr(config, "final_logit_softcapping", None)
    return HeadSpec(bias is not None, float(scale), None if softcap is None else float(softcap))


def apply_head(
    head_input: Float[Tensor, "*tokens d"],
    weight: Float[Tensor, "vocab d"],
    bias: Float[Tensor, " vocab"] | None,
    spec: HeadSpec,
) -> Float[Tensor, "*tokens vocab"]:
    """Return the logits the model computes from `head_input`; differentiable in every tensor."""
    return finish_logits(F.linear(head_input, weight, bias), spec)


def run_head(
    model: PreTrainedModel, head_input: Float[Tensor, "*tokens d"], spec: HeadSpec
) -> Float[Tensor, "*tokens vocab"]:
    """Return the logits of some rows by the model's own head, wherever it has its weight.

    Raises:
        IncompatibleError: If the model has no linear output embedding.
    """
    return finish_logits(linear_head(model)(head_input), spec)


def finish_logits(
    logits: Float[Tensor, "*tokens vocab"], spec: HeadSpec
) -> Float[Tensor, "*tokens vocab"]:
    """Return logits from what the head's matrix and bias give: its scale, then its soft cap."""
    if spec.scale != 1.0:
        logits = logits * spec.scale
    if spec.softcap is not None:
        logits = torch.tanh(logits / spec.softcap) * spec.softcap
    return logits
