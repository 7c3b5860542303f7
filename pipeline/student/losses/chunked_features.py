"""Losses of hidden states through a projector, some tokens at a time.

The teacher's states are several times as wide as the student's, and so is what the projector makes
of these. Both exist for a chunk of tokens. Gradients are found with the values (`ahead`): until the
backward pass a layer keeps those of its own states and of the projector.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pipeline.student.losses.ahead import Ahead, at_least_one, gradients_ahead
from pipeline.student.losses.counting import Count

CPU_VALUES = 2**20
"""Values of a chunk in the teacher's width, a side: 4 MiB in float32, which stay near the cache."""
DEVICE_VALUES = 2**24
"""The same on a GPU, whose kernels want enough to do for each launch."""


def chunked_feature_loss(
    loss: Callable[..., Tensor],
    hidden: Float[Tensor, "tokens d_student"],
    projector: nn.Module,
    teacher: Callable[[slice], Float[Tensor, "rows d_teacher"]],
    *,
    d_teacher: int,
    count: Count,
    values: int | None = None,
) -> Float[Tensor, ""]:
    """Return a loss of one layer's states, with a graph to them and to the projector.

    Value and gradients are those of all tokens at once, to the rounding of sums; the projector's
    gradient is summed in float32.

    Args:
        loss: Takes states of both sides and the count, and returns a sum over tokens divided by
            the count.
        hidden: The student's states of the tokens that count.
        projector: Takes rows of them to the teacher's width.
        teacher: Gives rows of the teacher's states of the same tokens.
        d_teacher: Their width.
        count: Tokens to divide by, over all accumulation steps and ranks; not None, because a chunk
            does not know the others' tokens.
        values: Values of a chunk in the teacher's width; None: as fits the device.
    """
    parameters = list(projector.parameters())
    scale = at_least_one(count)
    if values is None:
        values = CPU_VALUES if hidden.device.type == "cpu" else DEVICE_VALUES
    size = max(1, values // d_teacher)

    def compute(needs: tuple[bool, ...]) -> Ahead:
        of_hidden = torch.empty_like(hidden) if needs[0] else None
        trained = [one for one, is_needed in zip(parameters, needs[1:], strict=True) if is_needed]
        sums = [torch.zeros_like(one, dtype=torch.float32) for one in trained]
        total = torch.zeros((), device=hidden.device)
        for first in range(0, max(1, len(hidden)), size):
            rows = slice(first, first + size)
            states = hidden.detach()[rows].requires_grad_(needs[0])
            with torch.set_grad_enabled(any(needs)):
                value = loss(projector(states), teacher(rows), count)
            total += value.detach()
            if any(needs):
                inputs = [*([states] if needs[0] else []), *trained]
                found = list(torch.autograd.grad(value, inputs, value.new_ones(()) * scale))
                if of_hidden is not None:
                    of_hidden[rows] = found.pop(0)
                for kept, one in zip(sums, found, strict=True):
                    kept += one
        of_trained = iter(sums)
        gradients = (next(of_trained) if is_needed else None for is_needed in needs[1:])
        return Ahead(total, (), (of_hidden, *gradients))

    return gradients_ahead(compute, (hidden, *parameters), scale=scale)[0]
