"""Soft labels over the whole vocabulary: T² · KL(teacher ‖ student) at temperature T.

The factor T² (Hinton et al., arXiv 1503.02531, section 2) keeps the gradient's size when the
temperature changes: without it the term fades as 1/T² beside the label loss.
"""

from jaxtyping import Float
from torch import Tensor

from pipeline.student.losses.classes import full_classes, kl_rows
from pipeline.student.losses.counting import Count, sum_over_count


def forward_kl(
    student_logits: Float[Tensor, "rows vocab"],
    teacher_logits: Float[Tensor, "rows vocab"],
    temperature: float,
    count: Count = None,
) -> Float[Tensor, ""]:
    """Divergence of the student's distribution from the teacher's, summed over rows / `count`.

    It is the divergence and not the cross-entropy: the teacher's own entropy is taken off, so
    the value says how far there is to go.

    Args:
        student_logits: Raw logits, not divided by the temperature.
        teacher_logits: Raw logits of the same rows; -inf for a class of no mass. No gradient.
        temperature: Divides both sides' logits; above 0.
        count: Rows to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss in nats a row times T²; 0 exactly when the logits agree or no row is given.
    """
    student, teacher = full_classes(student_logits, teacher_logits, temperature)
    return sum_over_count(kl_rows(teacher, student), count) * temperature**2
