"""Soft labels from ids drawn from the teacher: an unbiased estimate at a few bytes a token.

Sparse logit sampling (arXiv 2503.16870): what top-k leaves out is not cut off but rarely drawn, so
the expected gradient is that of the full forward KL.
"""

from jaxtyping import Float, Int
from torch import Tensor

from pipeline.student.losses.counting import Count, sum_over_count


def sampled_cross_entropy(
    student_logits: Float[Tensor, "rows vocab"],
    samples: Int[Tensor, "rows draws"],
    temperature: float = 1.0,
    count: Count = None,
) -> Float[Tensor, ""]:
    """Mean over draws of -log q(id), summed over rows and divided by `count`.

    A cross-entropy and no divergence: its expectation is KL(p ‖ q) and the teacher's entropy,
    which the draws do not tell. The gradient in expectation is the forward KL's; the value does
    not reach 0 and compares with no other output loss.

    Args:
        student_logits: Raw logits over the whole vocabulary.
        samples: Ids drawn from the teacher at temperature 1, repeated as often as drawn.
        temperature: 1, at which they were drawn.
        count: Rows to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss in nats a row; 0 exactly when no row is given.

    Raises:
        ValueError: At another temperature.
    """
    if temperature != 1.0:
        raise ValueError(f"temperature is {temperature}; the samples were drawn at 1")
    log_probs = student_logits.float().log_softmax(dim=-1)
    return sum_over_count(-log_probs.gather(1, samples.long()).mean(dim=-1), count)
