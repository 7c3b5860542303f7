"""The squared distance of bare logits (Ba and Caruana, arXiv 1312.6184): nothing is softened.

For a regression, whose one output is the number itself, it is the only output loss.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.student.losses.counting import Count, sum_over_count


def logits_mse(
    student_logits: Float[Tensor, "rows outputs"],
    teacher_logits: Float[Tensor, "rows outputs"],
    temperature: float = 1.0,
    count: Count = None,
) -> Float[Tensor, ""]:
    """Mean squared distance over each row's outputs, summed over rows and divided by `count`.

    Args:
        student_logits: Raw outputs.
        teacher_logits: Raw outputs of the same rows; one of -inf is left out of sum and mean. No
            gradient.
        temperature: 1; a place in the call that all output losses share.
        count: Rows to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss; 0 exactly when the outputs agree or no row is given.

    Raises:
        ValueError: At another temperature.
    """
    if temperature != 1.0:
        raise ValueError(f"temperature is {temperature}; bare logits have none, expected 1")
    teacher = teacher_logits.detach().float()
    finite = teacher.isfinite()
    difference = student_logits.float().masked_fill(~finite, 0.0) - torch.where(
        finite, teacher, 0.0
    )
    outputs = finite.sum(dim=-1).clamp(min=1)
    return sum_over_count(difference.square().sum(dim=-1) / outputs, count)
