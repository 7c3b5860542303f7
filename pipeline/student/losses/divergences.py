"""Other divergences of two distributions than the forward KL: p is the teacher, q the student.

All take log-probabilities of classes and give one value a row. They look at the teacher where it
has no mass, as the forward KL never does, so log-probabilities are floored: a class of no mass
counts as one of mass e^-87, which punishes the student for it by a finite number and keeps every
gradient finite.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from pipeline.student.losses.classes import full_classes, kl_rows, topk_classes
from pipeline.student.losses.counting import Count, sum_over_count

FLOOR = math.log(torch.finfo(torch.float32).tiny)
"""The smallest log-probability: that of the smallest normal number of float32."""

Divergence = Callable[..., Tensor]


def reverse_kl(
    student: Float[Tensor, "rows classes"],
    teacher: Float[Tensor, "rows classes"],
    skew: float = 0.0,
) -> Float[Tensor, " rows"]:
    """KL(q ‖ p), which seeks a mode instead of covering all (MiniLLM, arXiv 2306.08543)."""
    return kl_rows(student, teacher)


def jsd(
    student: Float[Tensor, "rows classes"],
    teacher: Float[Tensor, "rows classes"],
    skew: float = 0.0,
) -> Float[Tensor, " rows"]:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q): at most ln 2.

    The generalised divergence of GKD (arXiv 2306.13649) at β = 0.5.
    """
    middle = torch.logaddexp(student, teacher) - math.log(2.0)
    return (kl_rows(teacher, middle) + kl_rows(student, middle)) / 2


def tvd(
    student: Float[Tensor, "rows classes"],
    teacher: Float[Tensor, "rows classes"],
    skew: float = 0.0,
) -> Float[Tensor, " rows"]:
    """Total variation, ½ Σ |p - q| (f-distillation, arXiv 2307.15190): at most 1."""
    return (teacher.exp() - student.exp()).abs().sum(dim=-1) / 2


def skew_forward_kl(
    student: Float[Tensor, "rows classes"], teacher: Float[Tensor, "rows classes"], skew: float
) -> Float[Tensor, " rows"]:
    """KL(p ‖ a p + (1 - a) q) with a = `skew` (DistiLLM, arXiv 2402.03898): at most -ln a."""
    return kl_rows(teacher, _mixture(teacher, student, skew))


def skew_reverse_kl(
    student: Float[Tensor, "rows classes"], teacher: Float[Tensor, "rows classes"], skew: float
) -> Float[Tensor, " rows"]:
    """KL(q ‖ a q + (1 - a) p) with a = `skew` (DistiLLM, arXiv 2402.03898): at most -ln a."""
    return kl_rows(student, _mixture(student, teacher, skew))


def _mixture(
    first: Float[Tensor, "rows classes"], second: Float[Tensor, "rows classes"], share: float
) -> Float[Tensor, "rows classes"]:
    """Log of share · first + (1 - share) · second."""
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def over_logits(divergence: Divergence) -> Divergence:
    """Make a loss of student and teacher logits, called as `forward_kl` with `skew` beside."""

    def loss(
        student_logits: Float[Tensor, "rows vocab"],
        teacher_logits: Float[Tensor, "rows vocab"],
        temperature: float,
        count: Count = None,
        *,
        skew: float = 0.1,
    ) -> Float[Tensor, ""]:
        sides = full_classes(student_logits, teacher_logits, temperature)
        return _floored(divergence, sides, skew, count) * temperature**2

    return loss


def over_topk(divergence: Divergence) -> Divergence:
    """Make a loss over the top-k and the ghost, called as `forward_kl_topk` with `skew` beside."""

    def loss(
        student_logits: Float[Tensor, "rows vocab"],
        ids: Tensor,
        log_probs: Float[Tensor, "rows k"],
        log_normalizer: Float[Tensor, " rows"],
        temperature: float,
        count: Count = None,
        *,
        skew: float = 0.1,
    ) -> Float[Tensor, ""]:
        sides = topk_classes(student_logits, ids, log_probs, log_normalizer, temperature)
        return _floored(divergence, sides, skew, count) * temperature**2

    return loss


def _floored(
    divergence: Divergence, sides: tuple[Tensor, Tensor], skew: float, count: Count
) -> Float[Tensor, ""]:
    student, teacher = (side.clamp(min=FLOOR) for side in sides)
    return sum_over_count(divergence(student, teacher, skew), count)
