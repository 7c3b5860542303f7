"""Soft labels for classes that do not exclude each other: a yes-or-no divergence for each class."""

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from pipeline.student.losses.counting import Count, sum_over_count


def binary_kl(
    student_logits: Float[Tensor, "rows classes"],
    teacher_logits: Float[Tensor, "rows classes"],
    temperature: float,
    count: Count = None,
) -> Float[Tensor, ""]:
    """T² · mean over classes of KL(σ(teacher / T) ‖ σ(student / T)), summed over rows / `count`.

    The mean, as in the label loss of the same task: weights then mean the same for any classes.

    Args:
        student_logits: Raw logits, one a class, not divided by the temperature.
        teacher_logits: Raw finite logits of the same rows. No gradient.
        temperature: Divides both sides' logits; above 0.
        count: Rows to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss in nats a row times T²; 0 exactly when the logits agree or no row is given.
    """
    teacher = teacher_logits.detach().float() / temperature
    student = student_logits.float() / temperature
    yes = teacher.sigmoid() * (logsigmoid(teacher) - logsigmoid(student))
    no = (-teacher).sigmoid() * (logsigmoid(-teacher) - logsigmoid(-student))
    return sum_over_count((yes + no).mean(dim=-1), count) * temperature**2
