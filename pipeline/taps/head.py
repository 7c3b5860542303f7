"""The output head as a matrix, a bias, a scale and a soft cap, applied by one function.

With these the logits of the full vocabulary follow from the head's input, without the model.
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
    """A head's operations in addition to its matrix: logits = cap(scale · (x Wᵀ + bias)).

    With a soft cap c, cap(z) = c · tanh(z / c); without one, cap(z) = z.
    """

    bias: bool
    scale: float = 1.0
    softcap: float | None = None


def linear_head(model: PreTrainedModel) -> nn.Linear:
    """Return the model's output embedding.

    Raises:
        IncompatibleError: If it has none, or one that is not linear.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        actual = "no output embedding" if head is None else f"a {type(head).__name__} as its head"
        raise IncompatibleError(
            f"{type(model).__name__} has {actual}, expected a linear lm_head; leave the head out "
            "and keep its logits in another form"
        )
    return head


def head_parameters(
    model: PreTrainedModel,
) -> tuple[Float[Tensor, "vocab d"], Float[Tensor, " vocab"] | None]:
    """Return weight and bias of the model's output embedding; copied only if offloaded.

    Raises:
        IncompatibleError: If the model has no linear output embedding.
    """
    weights = plain_weights(linear_head(model))
    return weights["weight"], weights.get("bias")


def read_head_spec(model: PreTrainedModel) -> HeadSpec:
    """Read bias, scale and soft cap of a model's head from its configuration.

    They are found by key name, so `check_taps` verifies the result by value.

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
    """Return the model's logits for `head_input`; differentiable in every tensor."""
    return finish_logits(F.linear(head_input, weight, bias), spec)


def run_head(
    model: PreTrainedModel, head_input: Float[Tensor, "*tokens d"], spec: HeadSpec
) -> Float[Tensor, "*tokens vocab"]:
    """Return the logits that the model's own head computes, on whatever device its weight is.

    Raises:
        IncompatibleError: If the model has no linear output embedding.
    """
    return finish_logits(linear_head(model)(head_input), spec)


def finish_logits(
    logits: Float[Tensor, "*tokens vocab"], spec: HeadSpec
) -> Float[Tensor, "*tokens vocab"]:
    """Apply a head's scale and soft cap to the output of its matrix and bias."""
    if spec.scale != 1.0:
        logits = logits * spec.scale
    if spec.softcap is not None:
        logits = torch.tanh(logits / spec.softcap) * spec.softcap
    return logits
