"""Soft labels from the teacher's top-k and the ghost class of everything outside it."""

from jaxtyping import Float, Int
from torch import Tensor

from pipeline.student.losses.classes import kl_rows, topk_classes
from pipeline.student.losses.counting import Count, sum_over_count


def forward_kl_topk(
    student_logits: Float[Tensor, "rows vocab"],
    ids: Int[Tensor, "rows k"],
    log_probs: Float[Tensor, "rows k"],
    log_normalizer: Float[Tensor, " rows"],
    temperature: float,
    count: Count = None,
) -> Float[Tensor, ""]:
    """T² · KL over k + 1 classes, summed over rows and divided by `count`.

    A lower bound of `forward_kl` (merging classes never raises a divergence), equal to it when
    k is the vocabulary.

    Args:
        student_logits: Raw logits over the whole vocabulary, not divided by the temperature.
        ids: The teacher's most probable ids of each row, each once.
        log_probs: The teacher's log-probabilities of `ids` at temperature 1. No gradient.
        log_normalizer: logsumexp over the whole vocabulary of log-probabilities / T, as captured;
            0 at T = 1. It cannot be derived from the top-k.
        temperature: Divides both sides' logits; above 0.
        count: Rows to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss in nats a row times T²; 0 to rounding when student and teacher agree, and exactly
        when no row is given. The gradient stays finite with all or none of the student's
        mass inside the top-k.
    """
    student, teacher = topk_classes(student_logits, ids, log_probs, log_normalizer, temperature)
    return sum_over_count(kl_rows(teacher, student), count) * temperature**2
