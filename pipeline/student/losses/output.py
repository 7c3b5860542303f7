"""Output losses: how far the student's outputs are from the teacher's.

p is the teacher's distribution, q the student's. A divergence is one function of log-probabilities,
declared with `divergence`, which makes the versions for all classes and for the top-k of it. Both
carry the factor T² (Hinton et al., arXiv 1503.02531, section 2), which keeps the gradient's size
when the temperature T changes: without it the term fades as 1/T² compared with the label loss.

With the top-k, everything outside the k classes is one further class, the ghost. Both sides keep
their true mass inside the top-k. Renormalising either side over the k ids would leave what the
student puts elsewhere unpunished, with a gradient three times too large and half of it in the wrong
direction.
"""

import math
from collections.abc import Callable
from typing import Annotated

from jaxtyping import Float, Int
from pydantic import Field, model_validator

from pipeline.student.losses.counting import Count, sum_over_count
from pipeline.student.losses.lazy_torch import Tensor, torch
from pipeline.student.losses.registry import (
    ALL_TASKS,
    DISTRIBUTIONS,
    MULTI_LABEL,
    LossOptions,
    OutputLoss,
)

FLOOR = math.log(2.0**-126)
"""The smallest log-probability: that of the smallest normal number of float32."""

Divergence = Callable[..., Tensor]
"""Takes log-probabilities of the student and the teacher, [rows, classes], and the options as
keywords; returns one value a row."""


def divergence(
    name: str,
    *,
    options: type[LossOptions] = LossOptions,
    sampled: Callable[..., Tensor] | None = None,
    is_floored: bool = True,
) -> Callable[[Divergence], OutputLoss]:
    """Declare the function below as a divergence of distributions over classes.

    Args:
        name: Its name in `params.yaml`.
        options: The model of its options.
        sampled: Its estimate from ids that were drawn from the teacher.
        is_floored: Whether it looks at classes where the teacher has no mass. Log-probabilities are
            then floored: a class of no mass counts as one of mass e^-87, which punishes the student
            for it by a finite number and keeps every gradient finite.
    """
    defaults = options().model_dump()

    def declare(function: Divergence) -> OutputLoss:
        def summed(
            sides: tuple[Tensor, Tensor], temperature: float, count: Count, given: dict[str, float]
        ) -> Tensor:
            student, teacher = sides
            if is_floored:
                student, teacher = student.clamp(min=FLOOR), teacher.clamp(min=FLOOR)
            per_row = function(student, teacher, **{**defaults, **given})
            return sum_over_count(per_row, count) * temperature**2

        def full(
            student_logits: Float[Tensor, "rows vocab"],
            teacher_logits: Float[Tensor, "rows vocab"],
            temperature: float,
            count: Count = None,
            **given: float,
        ) -> Float[Tensor, ""]:
            sides = full_classes(student_logits, teacher_logits, temperature)
            return summed(sides, temperature, count, given)

        def topk(
            student_logits: Float[Tensor, "rows vocab"],
            ids: Int[Tensor, "rows k"],
            log_probs: Float[Tensor, "rows k"],
            log_normalizer: Float[Tensor, " rows"],
            temperature: float,
            count: Count = None,
            **given: float,
        ) -> Float[Tensor, ""]:
            sides = topk_classes(student_logits, ids, log_probs, log_normalizer, temperature)
            return summed(sides, temperature, count, given)

        return OutputLoss(
            name=name,
            tasks=DISTRIBUTIONS,
            full=full,
            topk=topk,
            sampled=sampled,
            options=options,
        )

    return declare


def logits_loss(
    name: str, *, tasks: frozenset[str], has_temperature: bool = True
) -> Callable[[Callable[..., Tensor]], OutputLoss]:
    """Declare the function below as a loss that needs the teacher's logits of all outputs."""
    return lambda function: OutputLoss(
        name=name, tasks=tasks, full=function, has_temperature=has_temperature
    )


def full_classes(
    student_logits: Float[Tensor, "rows vocab"],
    teacher_logits: Float[Tensor, "rows vocab"],
    temperature: float,
) -> tuple[Float[Tensor, "rows vocab"], Float[Tensor, "rows vocab"]]:
    """Return the student's and the teacher's log-probabilities of all classes.

    Args:
        student_logits: Raw logits, not divided by the temperature.
        teacher_logits: Raw logits of the same rows; -inf for a class of no mass. No gradient.
        temperature: Divides both sides' logits; above 0.
    """
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
    """Return the student's and the teacher's log-probabilities of the k ids and of the ghost.

    If k is the vocabulary there is no ghost.

    Args:
        student_logits: Raw logits over the vocabulary, not divided by the temperature.
        ids: The teacher's most probable ids of each row, each once.
        log_probs: The teacher's log-probabilities of `ids` at temperature 1. No gradient.
        log_normalizer: logsumexp over the vocabulary of log-probabilities / T, as captured; 0 at
            T = 1. It cannot be derived from the top-k.
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


def sampled_cross_entropy(
    student_logits: Float[Tensor, "rows vocab"],
    samples: Int[Tensor, "rows draws"],
    temperature: float = 1.0,
    count: Count = None,
) -> Float[Tensor, ""]:
    """Mean over draws of -log q(id), summed over rows and divided by `count`.

    Sparse logit sampling (arXiv 2503.16870): what top-k leaves out is not cut off but rarely drawn,
    so the expected gradient is that of the full forward KL. The value is a cross-entropy and no
    divergence: its expectation is KL(p ‖ q) plus the teacher's entropy, which the draws do not
    give. So it does not reach 0 and compares with no other output loss.

    Args:
        student_logits: Raw logits over the vocabulary.
        samples: Ids drawn from the teacher at temperature 1, repeated as often as drawn.
        temperature: 1, at which they were drawn.
        count: Rows to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss in nats a row; exactly 0 when no row is given.

    Raises:
        ValueError: At another temperature.
    """
    if temperature != 1.0:
        raise ValueError(f"temperature is {temperature}; the samples were drawn at 1")
    log_probs = student_logits.float().log_softmax(dim=-1)
    return sum_over_count(-log_probs.gather(1, samples.long()).mean(dim=-1), count)


@divergence("forward_kl", sampled=sampled_cross_entropy, is_floored=False)
def forward_kl(
    student: Float[Tensor, "rows classes"], teacher: Float[Tensor, "rows classes"]
) -> Float[Tensor, " rows"]:
    """KL(p ‖ q), and not the cross-entropy: the value says how far there is to go.

    Over the top-k it is a lower bound of itself over all classes, because merging classes never
    raises it.
    """
    return kl_rows(teacher, student)


@divergence("reverse_kl")
def reverse_kl(
    student: Float[Tensor, "rows classes"], teacher: Float[Tensor, "rows classes"]
) -> Float[Tensor, " rows"]:
    """KL(q ‖ p), which seeks a mode instead of covering all (MiniLLM, arXiv 2306.08543)."""
    return kl_rows(student, teacher)


@divergence("jsd")
def jsd(
    student: Float[Tensor, "rows classes"], teacher: Float[Tensor, "rows classes"]
) -> Float[Tensor, " rows"]:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = ½ (p + q): at most ln 2.

    The generalised divergence of GKD (arXiv 2306.13649) at β = 0.5.
    """
    middle = torch.logaddexp(student, teacher) - math.log(2.0)
    return (kl_rows(teacher, middle) + kl_rows(student, middle)) / 2


@divergence("tvd")
def tvd(
    student: Float[Tensor, "rows classes"], teacher: Float[Tensor, "rows classes"]
) -> Float[Tensor, " rows"]:
    """Total variation, ½ Σ |p - q| (f-distillation, arXiv 2307.15190): at most 1."""
    return (teacher.exp() - student.exp()).abs().sum(dim=-1) / 2


class SkewOptions(LossOptions):
    """The share of its own side that a skewed divergence mixes into the other."""

    skew: Annotated[float, Field(gt=0, lt=1)] = 0.1


@divergence("skew_forward_kl", options=SkewOptions)
def skew_forward_kl(
    student: Float[Tensor, "rows classes"], teacher: Float[Tensor, "rows classes"], *, skew: float
) -> Float[Tensor, " rows"]:
    """KL(p ‖ a p + (1 - a) q) with a = `skew` (DistiLLM, arXiv 2402.03898): at most -ln a."""
    return kl_rows(teacher, _mixture(teacher, student, skew))


@divergence("skew_reverse_kl", options=SkewOptions)
def skew_reverse_kl(
    student: Float[Tensor, "rows classes"], teacher: Float[Tensor, "rows classes"], *, skew: float
) -> Float[Tensor, " rows"]:
    """KL(q ‖ a q + (1 - a) p) with a = `skew` (DistiLLM, arXiv 2402.03898): at most -ln a."""
    return kl_rows(student, _mixture(student, teacher, skew))


def _mixture(
    first: Float[Tensor, "rows classes"], second: Float[Tensor, "rows classes"], share: float
) -> Float[Tensor, "rows classes"]:
    """Log of share · first + (1 - share) · second."""
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


class AlphaBetaOptions(LossOptions):
    """The exponents of an alpha-beta divergence: `alpha` of the teacher, `beta` of the student."""

    alpha: Annotated[float, Field(ge=0, le=10)] = 0.2
    beta: Annotated[float, Field(ge=0, le=10)] = 0.7

    @model_validator(mode="after")
    def _can_be_computed(self) -> "AlphaBetaOptions":
        if self.alpha == self.beta == 0:
            raise ValueError("alpha 0 and beta 0: expected one of them above 0")
        for name, value in (("alpha", self.alpha), ("beta", self.beta)):
            if 0 < value < 0.01:
                raise ValueError(
                    f"{name} {value}: expected 0 or at least 0.01, below which float32 rounds the "
                    "loss away; use 0, the limit"
                )
        return self


@divergence("alpha_beta", options=AlphaBetaOptions)
def alpha_beta(
    student: Float[Tensor, "rows classes"],
    teacher: Float[Tensor, "rows classes"],
    *,
    alpha: float,
    beta: float,
) -> Float[Tensor, " rows"]:
    """Σ [α p^s + β q^s - s p^α q^β] / (α β s) with s = α + β (ABKD, arXiv 2505.04560).

    Its gradient for ln q is q^β (q^α - p^α) / α: a smaller α gives more weight to classes where p
    and q differ by a large factor, a larger β to classes that the student finds probable. α = 1,
    β = 0 is the forward KL and α = 0, β = 1 the reverse KL. Both at ½ it is four times the squared
    Hellinger distance 1 - Σ √(p q), both at 1 half the squared Euclidean distance.

    Merging classes may raise it unless s = 1, so over the top-k it is no lower bound.
    """
    if beta == 0:
        return _alpha_limit(teacher, student, alpha)
    if alpha == 0:
        return _alpha_limit(student, teacher, beta)
    both = alpha + beta
    # Relative to the larger side of each class: no power overflows, and equal sides are at 0.
    largest = torch.maximum(student, teacher).detach()
    p, q = teacher - largest, student - largest
    terms = alpha * torch.expm1(both * p) + beta * torch.expm1(both * q)
    terms = terms - both * torch.expm1(alpha * p + beta * q)
    return ((both * largest).exp() * terms).sum(dim=-1) / (alpha * beta * both)


def _alpha_limit(
    first: Float[Tensor, "rows classes"], second: Float[Tensor, "rows classes"], alpha: float
) -> Float[Tensor, " rows"]:
    """The limit for β → 0: Σ [p^α ln (p^α / q^α) - p^α + q^α] / α² with p = `first`."""
    p, q = alpha * first, alpha * second
    return (p.exp() * (p - q) - p.exp() + q.exp()).sum(dim=-1) / alpha**2


@logits_loss("mse", tasks=ALL_TASKS, has_temperature=False)
def logits_mse(
    student_logits: Float[Tensor, "rows outputs"],
    teacher_logits: Float[Tensor, "rows outputs"],
    temperature: float = 1.0,
    count: Count = None,
) -> Float[Tensor, ""]:
    """Mean squared distance over each row's outputs, summed over rows and divided by `count`.

    The logits are compared as they are (Ba and Caruana, arXiv 1312.6184). For a regression, whose
    one output is the number itself, it is the only output loss.

    Args:
        student_logits: Raw outputs.
        teacher_logits: Raw outputs of the same rows; one of -inf is left out of sum and mean. No
            gradient.
        temperature: 1; all output losses are called with a temperature.
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


@logits_loss("binary_kl", tasks=MULTI_LABEL)
def binary_kl(
    student_logits: Float[Tensor, "rows classes"],
    teacher_logits: Float[Tensor, "rows classes"],
    temperature: float,
    count: Count = None,
) -> Float[Tensor, ""]:
    """T² · mean over classes of KL(σ(teacher / T) ‖ σ(student / T)), summed over rows / `count`.

    For classes that do not exclude each other. It is a mean, as in the label loss of the same task,
    so that a weight means the same for any number of classes.

    Args:
        student_logits: Raw logits, one a class, not divided by the temperature.
        teacher_logits: Raw finite logits of the same rows. No gradient.
        temperature: Divides both sides' logits; above 0.
        count: Rows to divide by, over all accumulation steps and ranks. None: those given.

    Returns:
        The loss in nats a row times T²; 0 exactly when the logits agree or no row is given.
    """
    logsigmoid = torch.nn.functional.logsigmoid
    teacher = teacher_logits.detach().float() / temperature
    student = student_logits.float() / temperature
    yes = teacher.sigmoid() * (logsigmoid(teacher) - logsigmoid(student))
    no = (-teacher).sigmoid() * (logsigmoid(-teacher) - logsigmoid(-student))
    return sum_over_count((yes + no).mean(dim=-1), count) * temperature**2
