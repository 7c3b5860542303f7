"""Output losses beside the forward KL: by loops written out, and by what all of them share."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.student.losses.label import (
    label_bce,
    label_cross_entropy,
    label_loss,
    label_mse,
)
from pipeline.student.losses.output import forward_kl, sampled_cross_entropy
from pipeline.student.losses.registry import OutputLoss, built_in

DIVERGENCES = [
    "forward_kl", "reverse_kl", "jsd", "tvd", "skew_forward_kl", "skew_reverse_kl", "alpha_beta"
]  # fmt: skip
SKEW = 0.3
OPTIONS = {
    "skew_forward_kl": {"skew": SKEW},
    "skew_reverse_kl": {"skew": SKEW},
    "alpha_beta": {"alpha": 0.3, "beta": 0.7},
}
"""Those of `alpha_beta` sum to 1: then it is an f-divergence, as the others are."""
OUTPUT = {loss.name: loss for loss in built_in(OutputLoss)}


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def topk_of(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = log_probs.topk(k, dim=-1)
    return ids, values, torch.logsumexp(log_probs / temperature, dim=-1)


def full(name: str, student: Tensor, teacher: Tensor, t: float = 1.0, count=None) -> Tensor:
    return OUTPUT[name].full(student, teacher, t, count, **OPTIONS.get(name, {}))


def topk(name: str, student: Tensor, parts: tuple, t: float = 1.0, count=None) -> Tensor:
    loss = OUTPUT[name].topk
    assert loss is not None
    return loss(student, *parts, t, count, **OPTIONS.get(name, {}))


def kl(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def alpha_beta_by_hand(p: list[float], q: list[float], alpha: float, beta: float) -> float:
    """Cichocki, Cruces and Amari, Entropy 13 (2011), equations 17 to 19."""
    if beta == 0:
        terms = [a**alpha * math.log((a / b) ** alpha) - a**alpha + b**alpha
                 for a, b in zip(p, q, strict=True)]  # fmt: skip
        return sum(terms) / alpha**2
    if alpha == 0:
        return alpha_beta_by_hand(q, p, beta, 0)
    both = alpha + beta
    terms = [
        a**alpha * b**beta - alpha / both * a**both - beta / both * b**both
        for a, b in zip(p, q, strict=True)
    ]
    return -sum(terms) / (alpha * beta)


def by_hand(name: str, p: list[float], q: list[float]) -> float:
    """The definitions, p the teacher's and q the student's probabilities."""

    def mix(x: list[float], y: list[float], share: float) -> list[float]:
        return [share * a + (1 - share) * b for a, b in zip(x, y, strict=True)]

    match name:
        case "forward_kl":
            return kl(p, q)
        case "reverse_kl":
            return kl(q, p)
        case "jsd":
            return (kl(p, mix(p, q, 0.5)) + kl(q, mix(p, q, 0.5))) / 2
        case "tvd":
            return sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2
        case "skew_forward_kl":
            return kl(p, mix(p, q, SKEW))
        case "alpha_beta":
            return alpha_beta_by_hand(p, q, **OPTIONS[name])
        case _:
            return kl(q, mix(q, p, SKEW))


def probabilities(logits: list[float], t: float) -> list[float]:
    powers = [math.exp(z / t) for z in logits]
    return [power / sum(powers) for power in powers]


@pytest.mark.parametrize("t", [1.0, 2.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_divergence_is_its_definition(name, t):
    student, teacher = normal(5, 7), normal(5, 7, seed=1, scale=2.0)
    wanted, cut = 0.0, 0.0
    for q_row, p_row in zip(student.tolist(), teacher.tolist(), strict=True):
        p, q = probabilities(p_row, t), probabilities(q_row, t)
        wanted += t**2 * by_hand(name, p, q) / 5
        best = sorted(range(7), key=lambda i: -p_row[i])[:3]
        ghost = [1 - sum(side[i] for i in best) for side in (p, q)]
        p, q = ([side[i] for i in best] for side in (p, q))
        cut += t**2 * by_hand(name, [*p, ghost[0]], [*q, ghost[1]]) / 5
    assert full(name, student, teacher, t).item() == pytest.approx(wanted, rel=1e-5)
    assert topk(name, student, topk_of(teacher, 3, t), t).item() == pytest.approx(cut, rel=1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_sides_are_at_zero_with_no_gradient(name):
    logits = normal(4, 9, scale=3.0)
    student = logits.clone().requires_grad_()
    value = full(name, student, logits, 2.0)
    value.backward()
    assert value.item() == pytest.approx(0.0, abs=1e-6)
    assert student.grad is not None
    assert student.grad.abs().max() < 1e-6
    assert topk(name, logits, topk_of(logits, 4, 2.0), 2.0).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_ghost_merges_and_never_raises(name):
    """Merging classes lowers an f-divergence; with all ids it is the full one."""
    student, teacher = normal(6, 12), normal(6, 12, seed=1, scale=2.0)
    whole = full(name, student, teacher, 2.0)
    found = [topk(name, student, topk_of(teacher, k, 2.0), 2.0).item() for k in (1, 4, 12)]
    assert found == sorted(found)
    assert found[-1] == pytest.approx(whole.item(), rel=1e-5)


@pytest.mark.parametrize("name", [*DIVERGENCES, "mse"])
def test_classes_without_mass_leave_value_and_gradient_finite(name):
    teacher = normal(2, 6)
    teacher[:, 4:] = -torch.inf
    student = normal(2, 6, seed=1).requires_grad_()
    value = full(name, student, teacher)
    value.backward()
    assert value.isfinite()
    assert value.item() > 0
    assert student.grad is not None
    assert student.grad.isfinite().all()
    both = normal(2, 6, seed=1)
    both[:, 4:] = -torch.inf
    both.requires_grad_()
    full(name, both, teacher).backward()
    assert both.grad is not None
    assert both.grad.isfinite().all()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_far_sides_have_a_finite_gradient(name):
    teacher = torch.tensor([[500.0, 0.0, -500.0]])
    student = torch.tensor([[-500.0, 0.0, 500.0]]).requires_grad_()
    value = full(name, student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


def test_the_reverse_divergence_punishes_mass_where_the_teacher_has_none():
    teacher = torch.tensor([[0.0, 0.0, -torch.inf]])
    student = torch.zeros(1, 3).requires_grad_()
    full("reverse_kl", student, teacher).backward()
    assert student.grad is not None
    assert student.grad[0, 2] > 0 > student.grad[0, 0]


def test_bounded_divergences_keep_their_bounds():
    teacher, student = torch.tensor([[80.0, 0.0]]), torch.tensor([[0.0, 80.0]])
    assert full("jsd", student, teacher).item() == pytest.approx(math.log(2))
    assert full("tvd", student, teacher).item() == pytest.approx(1.0)
    for name in ("skew_forward_kl", "skew_reverse_kl"):
        assert full(name, student, teacher).item() == pytest.approx(-math.log(SKEW), rel=1e-4)


def test_skew_mixes_in_its_own_side():
    """DistiLLM: KL(p ‖ a p + (1 - a) q); near 0 it is the plain divergence."""
    student, teacher = normal(3, 5), normal(3, 5, seed=1)
    near = OUTPUT["skew_forward_kl"].full(student, teacher, 1.0, skew=1e-6)
    torch.testing.assert_close(near, forward_kl.full(student, teacher, 1.0), rtol=1e-4, atol=0)
    near = OUTPUT["skew_reverse_kl"].full(student, teacher, 1.0, skew=1e-6)
    torch.testing.assert_close(near, full("reverse_kl", student, teacher), rtol=1e-4, atol=0)


EXPONENTS = [(0.2, 0.7), (1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.0), (0.0, 0.4), (0.01, 2.0)]


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS)
def test_alpha_beta_is_its_definition_in_value_and_gradient(alpha, beta):
    """The definition in float64, differentiated by torch."""
    student, teacher, t = normal(5, 7).requires_grad_(), normal(5, 7, seed=1, scale=2.0), 2.0
    p = (teacher.double() / t).softmax(-1)
    q = (student.double() / t).softmax(-1)
    both = alpha + beta
    if beta == 0:
        terms = (p**alpha * (p / q).log() * alpha - p**alpha + q**alpha) / alpha**2
    elif alpha == 0:
        terms = (q**beta * (q / p).log() * beta - q**beta + p**beta) / beta**2
    else:
        terms = alpha * p**both + beta * q**both - both * p**alpha * q**beta
        terms = terms / (alpha * beta * both)
    wanted = t**2 * terms.sum() / 5
    found = OUTPUT["alpha_beta"].full(student, teacher, t, alpha=alpha, beta=beta)
    hand = sum(
        alpha_beta_by_hand(*rows, alpha, beta) for rows in zip(p.tolist(), q.tolist(), strict=True)
    )
    assert wanted.item() == pytest.approx(t**2 * hand / 5, rel=1e-9)
    assert found.item() == pytest.approx(wanted.item(), rel=2e-5)
    (ours,), (theirs,) = (torch.autograd.grad(loss, student) for loss in (found, wanted))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("alpha", "beta"), EXPONENTS)
def test_alpha_beta_is_zero_for_equal_sides(alpha, beta):
    logits = normal(4, 9, scale=3.0)
    assert OUTPUT["alpha_beta"].full(logits, logits, 2.0, alpha=alpha, beta=beta).item() == 0.0


@pytest.mark.parametrize(
    ("limit", "near", "name"),
    [((1.0, 0.0), (1.0, 0.01), "forward_kl"), ((0.0, 1.0), (0.01, 1.0), "reverse_kl")],
)
def test_the_limits_of_alpha_beta_are_the_two_kls(limit, near, name):
    student, teacher, loss = normal(6, 9), normal(6, 9, seed=1), OUTPUT["alpha_beta"]
    parts = topk_of(teacher, 4, 2.0)
    for (alpha, beta), rtol in ((limit, 1e-5), (near, 0.05)):
        options = {"alpha": alpha, "beta": beta}
        wanted = full(name, student, teacher, 2.0)
        torch.testing.assert_close(
            loss.full(student, teacher, 2.0, **options), wanted, rtol=rtol, atol=0
        )
        assert loss.topk is not None
        torch.testing.assert_close(
            loss.topk(student, *parts, 2.0, **options), topk(name, student, parts, 2.0),
            rtol=rtol, atol=0,
        )  # fmt: skip


def test_the_limits_of_alpha_beta_are_continuous():
    student, teacher, loss = normal(6, 9), normal(6, 9, seed=1), OUTPUT["alpha_beta"].full
    for at, near in (((0.5, 0.0), (0.5, 0.01)), ((0.0, 0.4), (0.01, 0.4))):
        values = [loss(student, teacher, 1.0, alpha=a, beta=b).item() for a, b in (at, near)]
        assert values[0] == pytest.approx(values[1], rel=0.05)


def test_alpha_beta_has_the_papers_exponents_by_default():
    student, teacher, loss = normal(3, 5), normal(3, 5, seed=1), OUTPUT["alpha_beta"].full
    plain = loss(student, teacher, 1.0)
    assert plain.item() == loss(student, teacher, 1.0, alpha=0.2, beta=0.7).item()


def test_logits_mse_is_the_mean_square_of_what_is_finite():
    student = torch.tensor([[1.0, 2.0, 7.0], [0.0, 0.0, 0.0]])
    teacher = torch.tensor([[0.0, 4.0, -torch.inf], [3.0, 0.0, 0.0]])
    assert full("mse", student, teacher).item() == pytest.approx((2.5 + 3.0) / 2)
    with pytest.raises(ValueError, match=r"temperature is 2.0; bare logits have none"):
        full("mse", student, teacher, 2.0)


def test_binary_kl_is_a_mean_of_two_class_divergences():
    student, teacher, t = normal(4, 3), normal(4, 3, seed=1), 2.0
    pairs = [torch.stack([side / t, torch.zeros_like(side)], -1) for side in (student, teacher)]
    wanted = forward_kl.full(pairs[0].view(-1, 2), pairs[1].view(-1, 2), 1.0, count=4 * 3) * t**2
    torch.testing.assert_close(full("binary_kl", student, teacher, t), wanted)
    assert full("binary_kl", student, student, t).item() == 0.0


def test_samples_give_the_cross_entropy_they_estimate():
    student, samples = normal(2, 5), torch.tensor([[0, 0, 3], [1, 4, 4]])
    log_q = student.log_softmax(-1)
    wanted = -(2 * log_q[0, 0] + log_q[0, 3] + log_q[1, 1] + 2 * log_q[1, 4]) / 6
    torch.testing.assert_close(sampled_cross_entropy(student, samples), wanted)
    with pytest.raises(ValueError, match="samples were drawn at 1"):
        sampled_cross_entropy(student, samples, 2.0)


def test_the_gradient_of_samples_is_the_forward_divergences_in_expectation():
    teacher = torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    draws = torch.multinomial(
        teacher.softmax(-1), 100_000, True, generator=torch.Generator().manual_seed(0)
    )
    student = normal(1, 4).requires_grad_()
    (estimate,) = torch.autograd.grad(sampled_cross_entropy(student, draws), student)
    (exact,) = torch.autograd.grad(forward_kl.full(student, teacher, 1.0), student)
    torch.testing.assert_close(estimate, exact, rtol=0, atol=5e-3)


def test_labels_of_each_task():
    assert label_loss("regression") is label_mse
    assert label_loss("multi-label") is label_bce
    assert label_loss("prompt-target") is label_loss("classification") is label_cross_entropy
    logits, targets = torch.tensor([[0.0, 2.0]]), torch.tensor([[1.0, 0.0]])
    wanted = (-math.log(0.5) - math.log(1 - 1 / (1 + math.exp(-2)))) / 2
    assert label_bce(logits, targets).item() == pytest.approx(wanted)
    assert label_mse(logits, targets).item() == pytest.approx((1 + 4) / 2)


def _forms() -> list:
    teacher = normal(8, 6, seed=9)
    found = [
        pytest.param(lambda s, r, c, n=name: full(n, s, teacher[r], 2.0, c), id=name)
        for name in [*DIVERGENCES, "binary_kl"]
    ]
    found += [
        pytest.param(
            lambda s, r, c, n=name: topk(n, s, [p[r] for p in topk_of(teacher, 3, 2.0)], 2.0, c),
            id=f"{name}-topk",
        )
        for name in DIVERGENCES
    ]
    chosen = torch.arange(24).view(8, 3) % 6
    found.append(pytest.param(lambda s, r, c: full("mse", s, teacher[r], 1.0, c), id="mse"))
    found.append(
        pytest.param(lambda s, r, c: sampled_cross_entropy(s, chosen[r], 1.0, c), id="sampled")
    )
    found.append(pytest.param(lambda s, r, c: label_bce(s, teacher[r].sigmoid(), c), id="bce"))
    found.append(pytest.param(lambda s, r, c: label_mse(s, teacher[r], c), id="label_mse"))
    return found


ALL = pytest.mark.parametrize("loss", _forms())


@ALL
def test_row_order_and_composition_change_nothing(loss):
    student, order = normal(8, 6), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    whole = loss(student, torch.arange(8), None)
    assert whole.item() > 0
    torch.testing.assert_close(loss(student[order], order, None), whole)
    parts = [loss(student[rows], rows, 8) for rows in (torch.arange(3), torch.arange(3, 8))]
    torch.testing.assert_close(parts[0] + parts[1], whole)
    half = loss(student.bfloat16(), torch.arange(8), None)
    assert half.dtype == torch.float32


@ALL
def test_no_rows_are_zero_with_zero_gradients(loss):
    for count in (None, 0, torch.tensor(5.0)):
        student = normal(8, 6).requires_grad_()
        value = loss(student[:0], torch.arange(0), count)
        value.backward()
        assert value.item() == 0.0
        assert student.grad is not None
        assert (student.grad == 0).all()
