"""Losses by written-out numbers, by the properties they share, and by the bugs others had."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pipeline.errors import ConfigError
from pipeline.student.losses.attention import attention_kl
from pipeline.student.losses.feature import feature_mse
from pipeline.student.losses.label import label_cross_entropy
from pipeline.student.losses.output import forward_kl
from pipeline.student.losses.registry import AttentionLoss, FeatureLoss, OutputLoss, find_loss


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def topk_of(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """What capture stores: softmax over the whole vocabulary first, the cut after."""
    log_probs = torch.log_softmax(logits.float(), dim=-1)
    values, ids = log_probs.topk(k, dim=-1)
    return ids, values, torch.logsumexp(log_probs / temperature, dim=-1)


# Features


def test_feature_mse_is_the_channel_mean_averaged_over_tokens():
    student = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    teacher = torch.tensor([[0.0, 0.0], [0.0, 4.0]])
    assert feature_mse(student, teacher).item() == pytest.approx((2.5 + 8.0) / 2)
    assert feature_mse(student, teacher, count=4).item() == pytest.approx((2.5 + 8.0) / 4)


def test_feature_mse_widens_before_squaring():
    student = torch.full((1, 2), 300.0, dtype=torch.float16)
    assert feature_mse(student, torch.zeros(1, 2, dtype=torch.float16)).item() == 90_000.0


# Attention


def causal(batch: int, seq: int) -> Tensor:
    return torch.ones(seq, seq, dtype=torch.bool).tril().expand(batch, 1, seq, seq)


def attention(scores: Tensor, visible: Tensor, hidden: float = -1e9) -> Tensor:
    return torch.log_softmax(scores.masked_fill(~visible, hidden), dim=-1)


def test_attention_kl_by_hand():
    teacher = torch.tensor([[1.0, 0.0], [0.5, 0.5]]).log()[None, None]
    student = torch.tensor([[1.0, 0.0], [0.25, 0.75]]).log()[None, None]
    rows = torch.ones(1, 2, dtype=torch.bool)
    expected = (0.0 + 0.5 * math.log(2.0) + 0.5 * math.log(2 / 3)) / 2
    found = attention_kl(student, teacher, rows, causal(1, 2))
    assert found.item() == pytest.approx(expected, rel=1e-6)


def test_attention_kl_is_the_mean_over_heads():
    student, teacher = (attention(normal(1, 2, 3, 3, seed=s), causal(1, 3)) for s in (0, 1))
    rows = torch.ones(1, 3, dtype=torch.bool)
    heads = [
        attention_kl(student[:, h : h + 1], teacher[:, h : h + 1], rows, causal(1, 3))
        for h in (0, 1)
    ]
    both = attention_kl(student, teacher, rows, causal(1, 3))
    torch.testing.assert_close(both, (heads[0] + heads[1]) / 2)


@pytest.mark.parametrize("rubbish", [-torch.inf, torch.nan, torch.finfo(torch.float32).min])
def test_attention_kl_never_reads_invisible_keys_or_dead_rows(rubbish):
    visible = causal(2, 4).clone()
    rows = torch.tensor([[True] * 4, [True, True, False, False]])
    scores = normal(2, 3, 4, 4).requires_grad_()
    teacher = attention(normal(2, 3, 4, 4, seed=1), visible)
    clean = attention_kl(attention(scores, visible), teacher, rows, visible)
    (clean_gradient,) = torch.autograd.grad(clean, scores)
    dead = ~(visible & rows[:, None, :, None])
    student = attention(scores, visible)
    student = torch.where(dead, torch.tensor(rubbish), student)
    loss = attention_kl(student, teacher.masked_fill(dead, rubbish), rows, visible)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss.item() == clean.item()
    torch.testing.assert_close(gradient, clean_gradient)


def test_attention_kl_of_minus_infinity_scores_has_a_finite_gradient():
    visible = causal(1, 3)
    scores = normal(1, 1, 3, 3).requires_grad_()
    student = attention(scores, visible, hidden=-torch.inf)
    teacher = attention(normal(1, 1, 3, 3, seed=1), visible, hidden=-torch.inf)
    loss = attention_kl(student, teacher, torch.ones(1, 3, dtype=torch.bool), visible)
    loss.backward()
    assert scores.grad is not None
    assert scores.grad.isfinite().all()
    assert loss.item() > 0


def test_attention_kl_on_probabilities_is_another_number():
    """TextBrewer's attention_ce applies softmax to what is a probability already."""
    visible = causal(1, 3)
    student, teacher = (attention(normal(1, 1, 3, 3, seed=s, scale=3.0), visible) for s in (0, 1))
    rows = torch.ones(1, 3, dtype=torch.bool)
    twice = attention_kl(
        attention(student.exp(), visible), attention(teacher.exp(), visible), rows, visible
    )
    assert twice.item() < 0.5 * attention_kl(student, teacher, rows, visible).item()


def test_padding_a_batch_changes_no_attention_loss():
    visible = causal(1, 3)
    student, teacher = (attention(normal(1, 2, 3, 3, seed=s), visible) for s in (0, 1))
    alone = attention_kl(student, teacher, torch.ones(1, 3, dtype=torch.bool), visible)
    padded = [normal(2, 2, 5, 5, seed=s) for s in (2, 3)]
    for wide, narrow in zip(padded, (student, teacher), strict=True):
        wide[:1, :, :3, :3] = narrow
    rows = torch.zeros(2, 5, dtype=torch.bool)
    rows[0, :3] = True
    torch.testing.assert_close(attention_kl(*padded, rows, causal(2, 5)), alone)


# Outputs


def test_forward_kl_by_hand():
    teacher = torch.tensor([[0.5, 0.5]]).log()
    student = torch.tensor([[0.25, 0.75]]).log()
    expected = 0.5 * math.log(2.0) + 0.5 * math.log(2 / 3)
    assert forward_kl.full(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-6)


def test_forward_kl_carries_the_square_of_the_temperature():
    student, teacher = normal(4, 9), normal(4, 9, seed=1)
    softened = forward_kl.full(student / 2, teacher / 2, 1.0)
    torch.testing.assert_close(forward_kl.full(student, teacher, 2.0), 4 * softened)
    # In the limit of a high temperature the gradient no longer depends on it (Hinton et al.).
    gradients = []
    for temperature in (100.0, 400.0):
        logits = student.clone().requires_grad_()
        forward_kl.full(logits, teacher, temperature).backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(*gradients, rtol=0.02, atol=1e-4)


def test_forward_kl_is_no_cross_entropy():
    """torchtune's ForwardKLLoss(p, p) is the teacher's entropy."""
    logits = normal(3, 7)
    assert forward_kl.full(logits, logits.clone(), 2.0).item() == 0.0


def test_forward_kl_is_not_divided_by_the_vocabulary():
    """`reduction="mean"` of torch's kl_div does that (ModelOpt)."""
    student, teacher = normal(3, 50), normal(3, 50, seed=1)
    reference = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(forward_kl.full(student, teacher, 1.0), reference)


def test_classes_that_the_teacher_excludes_stay_finite():
    teacher = normal(2, 5)
    teacher[:, 3] = -torch.inf
    student = normal(2, 5, seed=1).requires_grad_()
    loss = forward_kl.full(student, teacher, 1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert (student.grad[:, 3] > 0).all()  # the student's mass there is pushed down
    assert forward_kl.full(teacher.clone(), teacher, 1.0).item() == 0.0


# Top-k


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_topk_by_hand_and_zero_when_equal(temperature):
    logits = normal(6, 20, scale=2.0)
    parts = topk_of(logits, 4, temperature)
    assert abs(forward_kl.topk(logits, *parts, temperature).item()) < 1e-5
    student = normal(6, 20, seed=1)
    ids = parts[0]
    p = torch.softmax(logits / temperature, -1).gather(1, ids)
    q = torch.softmax(student / temperature, -1).gather(1, ids)
    p, q = (torch.cat([x, 1 - x.sum(1, keepdim=True)], 1) for x in (p, q))
    expected = (p * (p / q).log()).sum(1).mean() * temperature**2
    torch.testing.assert_close(forward_kl.topk(student, *parts, temperature), expected)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_topk_of_the_whole_vocabulary_is_the_full_divergence(temperature):
    student, teacher = normal(5, 8), normal(5, 8, seed=1)
    parts = topk_of(teacher, 8, temperature)
    torch.testing.assert_close(
        forward_kl.topk(student, *parts, temperature),
        forward_kl.full(student, teacher, temperature),
    )


def test_mass_outside_the_topk_is_penalised():
    """MaxText renormalises the student over the teacher's ids, so this gradient is zero there."""
    teacher, student = normal(1, 12, scale=3.0), normal(1, 12, seed=1)
    parts = topk_of(teacher, 3, 1.0)
    outside = next(i for i in range(12) if i not in parts[0][0].tolist())
    raised = student.clone()
    raised[0, outside] += 4.0

    def renormalised(logits: Tensor) -> Tensor:
        p = torch.log_softmax(parts[1], -1)
        return forward_kl.full(logits.gather(1, parts[0]), p, 1.0)

    assert renormalised(raised).item() == renormalised(student).item()
    ours = [forward_kl.topk(logits, *parts, 1.0).item() for logits in (student, raised)]
    assert ours[1] > ours[0] + 0.5


def test_the_cut_before_softmax_is_another_teacher():
    """axolotl takes the top-k of logits and then softmax, which gives the tail's mass to the k."""
    logits = normal(4, 30)
    ids, values, normalizer = topk_of(logits, 5, 1.0)
    before = torch.log_softmax(logits.gather(1, ids), -1)
    right = forward_kl.topk(logits, ids, values, normalizer, 1.0)
    wrong = forward_kl.topk(logits, ids, before, normalizer, 1.0)
    assert abs(right.item()) < 1e-5 < 0.1 < wrong.item()


@pytest.mark.parametrize("shift", [60.0, 1e4, -60.0, -1e4])
def test_topk_gradient_is_finite_with_all_or_none_of_the_mass_inside(shift):
    teacher = normal(2, 10)
    parts = topk_of(teacher, 3, 1.0)
    student = normal(2, 10, seed=1).scatter_add(1, parts[0], torch.full((2, 3), shift))
    student.requires_grad_()
    loss = forward_kl.topk(student, *parts, 1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()
    assert student.grad.abs().max() > 0.01  # and it still points somewhere


def test_a_stored_topk_that_sums_above_one_has_no_tail():
    log_probs = torch.tensor([[0.6, 0.4004]]).log()
    student = normal(1, 6).requires_grad_()
    ids = torch.tensor([[1, 4]])
    loss = forward_kl.topk(student, ids, log_probs, torch.zeros(1), 1.0)
    loss.backward()
    assert loss.isfinite()
    assert student.grad is not None
    assert student.grad.isfinite().all()


@settings(deadline=None, max_examples=30)
@given(
    k=st.integers(1, 11),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 5.0]),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
)
def test_topk_lies_between_zero_and_the_full_divergence(k, temperature, seed, scale):
    student, teacher = normal(3, 12, seed=seed), normal(3, 12, seed=seed + 1, scale=scale)
    cut = forward_kl.topk(student, *topk_of(teacher, k, temperature), temperature).item()
    full = forward_kl.full(student, teacher, temperature).item()
    assert -1e-5 <= cut <= full * (1 + 1e-4) + 1e-4


# Labels


def test_label_cross_entropy_by_hand():
    logits = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    expected = -(math.log(0.75) + math.log(0.5)) / 2
    targets = torch.tensor([1, 0])
    assert label_cross_entropy(logits, targets).item() == pytest.approx(expected)


def test_an_ignored_index_fails_instead_of_being_counted():
    with pytest.raises(RuntimeError, match="out of bounds"):
        label_cross_entropy(normal(1, 4), torch.tensor([-100]))


# What all of them share: each as (student, rows of everything else) -> scalar


def _feature(student: Tensor, rows: Tensor, count=None) -> Tensor:
    return feature_mse(student, normal(8, 6, seed=9)[rows], count)


def _full(student: Tensor, rows: Tensor, count=None) -> Tensor:
    return forward_kl.full(student, normal(8, 6, seed=9)[rows], 2.0, count)


def _topk(student: Tensor, rows: Tensor, count=None) -> Tensor:
    parts = [part[rows] for part in topk_of(normal(8, 6, seed=9), 3, 2.0)]
    return forward_kl.topk(student, *parts, 2.0, count)


def _labels(student: Tensor, rows: Tensor, count=None) -> Tensor:
    return label_cross_entropy(student, torch.arange(8)[rows] % 6, count)


def _attention(student: Tensor, rows: Tensor, count=None) -> Tensor:
    """One query row a batch entry, of six keys."""
    everything = torch.ones(8, 1, 6, 6, dtype=torch.bool)[rows]
    live = torch.zeros(8, 6, dtype=torch.bool)[rows]
    live[:, 5] = True
    log_probs = student.log_softmax(-1)[:, None, None, :].expand(-1, 2, 6, 6)
    teacher = normal(8, 2, 6, 6, seed=9).log_softmax(-1)[rows]
    return attention_kl(log_probs, teacher, live, everything, count)


ALL = pytest.mark.parametrize("loss", [_feature, _full, _topk, _labels, _attention])


@ALL
def test_row_order_and_batch_composition_change_nothing(loss):
    student, order = normal(8, 6), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    whole = loss(student, torch.arange(8))
    torch.testing.assert_close(loss(student[order], order), whole)
    parts = [loss(student[rows], rows, 8) for rows in (torch.arange(3), torch.arange(3, 8))]
    torch.testing.assert_close(parts[0] + parts[1], whole)


@ALL
def test_no_rows_are_zero_with_zero_gradients_never_nan(loss):
    for count in (None, 0, 5.0, torch.tensor(0), torch.tensor(5.0)):
        student = normal(8, 6).requires_grad_()
        nothing = torch.arange(0)
        value = loss(student[nothing], nothing, count)
        value.backward()
        assert value.item() == 0.0
        assert student.grad is not None
        assert (student.grad == 0).all()


@ALL
def test_a_tensor_counts_like_a_number(loss):
    rows = torch.arange(8)
    assert loss(normal(8, 6), rows, torch.tensor(16)).item() == loss(normal(8, 6), rows, 16).item()
    torch.testing.assert_close(loss(normal(8, 6), rows, 16) * 2, loss(normal(8, 6), rows))


@ALL
def test_half_precision_is_computed_in_single(loss):
    student = normal(8, 6).bfloat16()
    value = loss(student, torch.arange(8))
    assert value.dtype == torch.float32
    if loss is not _attention:  # its log-softmax is the caller's
        assert value.item() == loss(student.float(), torch.arange(8)).item()


@ALL
def test_losses_are_not_negative(loss):
    for seed in range(20):
        assert loss(normal(8, 6, seed=seed, scale=5.0), torch.arange(8)).item() >= 0


def test_the_teacher_gets_no_gradient():
    student, teacher = normal(4, 6).requires_grad_(), normal(4, 6, seed=1).requires_grad_()
    values, ids = teacher.log_softmax(-1).topk(2)
    normalizer = teacher.logsumexp(-1) * 0.0
    maps = [
        part.log_softmax(-1)[:, None, None, :].expand(4, 1, 6, 6) for part in (student, teacher)
    ]
    rows, visible = torch.ones(4, 6, dtype=torch.bool), torch.ones(4, 1, 6, 6, dtype=torch.bool)
    losses = [
        feature_mse(student, teacher),
        forward_kl.full(student, teacher, 2.0),
        forward_kl.topk(student, ids, values, normalizer, 1.0),
        attention_kl(*maps, rows, visible),
    ]
    torch.stack(losses).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None


def test_a_loss_is_found_by_name_or_refused_with_the_names():
    assert find_loss(FeatureLoss, "mse") is feature_mse
    assert find_loss(AttentionLoss, "kl") is attention_kl
    assert find_loss(OutputLoss, "forward_kl") is forward_kl
    with pytest.raises(ConfigError, match=r"'output.kld' is unknown; .* output\.forward_kl"):
        find_loss(OutputLoss, "kld")
