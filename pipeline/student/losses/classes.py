"""Outputs as log-probabilities of classes on both sides, the one thing every divergence takes.

Either all classes, or the teacher's top-k with everything outside it as one further class, the
ghost. Both sides keep their true mass inside the top-k. Renormalising either side over the k ids
would leave what the student puts elsewhere unpunished, with a gradient three times too large and
half of it in the wrong direction.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def full_classes(
    student_logits: Float[Tensor, "rows vocab"],
    teacher_logits: Float[Tensor, "rows vocab"],
    temperature: float,
) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, "rows vocab"]]:
    """Return student's and teacher's log-probabilities of all classes at a temperature."""
    teacher = torch.log_softmax(teacher_logits.detach().float() / temperature, dim=-1)
    student = torch.log_softmax(student_logits.float() / temperature, dim=-1)
    return student, teacher


def topk_classes(
    student_logits: Float[Tensor, "rows vocab"],
    ids: Int[Tensor, "rows k"],
    log_probs: Float[Tensor, "rows k"],
    log_normalizer: Float[Tensor, " rows"],
    temperature: float,
) -> tuple[Float[Tensor, "rows classes"], Float[Tensor, "rows classes"]]:
    """Return student's and teacher's log-probabilities of the k ids and, where there is one, ghost.

    Args:
        student_logits: Raw logits over the whole vocabulary, not divided by the temperature.
        ids: The teacher's most probable ids of each row, each once.
        log_probs: The teacher's log-probabilities of `ids` at temperature 1. No gradient.
        log_normalizer: logsumexp over the whole vocabulary of log-probabilities / T, as captured;
            0 at T = 1. It cannot be derived from the top-k.
        temperature: Divides both sides' logits; above 0.
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
    return torch.log_softmax(classes, dim=-1), teacher


def kl_rows(
    first: Float[Tensor, "rows classes"], second: Float[Tensor, "rows classes"]
) -> Float[Tensor, " rows"]:
    """KL(first ‖ second) of each row from log-probabilities; -inf in `first` is no mass."""
    massless = first == -torch.inf  # 0 * log 0 = 0
    difference = (first - second).masked_fill(massless, 0.0)
    return (first.exp() * difference).sum(dim=-1)
