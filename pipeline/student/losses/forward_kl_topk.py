"""Soft labels from the teacher's top-k: everything outside it is one further class, the ghost.

Both sides keep their true mass inside the top-k. Renormalising either side over the k ids would
leave what the student puts elsewhere unpunished, with a gradient three times too large
and half of it in the wrong direction.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
    teacher = log_probs.detach().float() / temperature
    teacher = teacher - log_normalizer.detach().float()[:, None]
    logits = student_logits.float() / temperature
    ids = ids.long()
    classes = logits.gather(1, ids)
    if ids.shape[1] < logits.shape[1]:
        # The ghost's logit is the logsumexp of all the others. That says the same as
        # log(1 - sum of the top-k) without its cancellation when the top-k holds nearly all.
        ghost = logits.scatter(1, ids, -torch.inf).logsumexp(dim=-1, keepdim=True)
        classes = torch.cat([classes, ghost], dim=-1)
        tail = -torch.expm1(teacher.logsumexp(dim=-1, keepdim=True))
        # A stored top-k may sum to a rounding step above 1; there is no tail then.
        teacher = torch.cat([teacher, tail.clamp(min=0.0).log()], dim=-1)
    student = torch.log_softmax(classes, dim=-1)
    massless = teacher == -torch.inf  # 0 * log 0 = 0
    difference = (teacher - student).masked_fill(massless, 0.0)
    per_row = (teacher.exp() * difference).sum(dim=-1)
    return sum_over_count(per_row, count) * temperature**2
