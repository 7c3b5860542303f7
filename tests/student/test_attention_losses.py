"""Attention of unequal head counts: relations and the mean over heads, by loops written out."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.student.align.chunked import chunked_map_loss
from pipeline.student.losses.attention import attention_head_mean, attention_kl, relation_vectors
from pipeline.taps.scores import Rule, attention_log_probs, rows_of_vectors, visible_keys


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LENGTHS = torch.tensor([5, 3])
ROWS = torch.arange(5) < LENGTHS[:, None]


def relation_by_loops(vectors: Tensor, heads: int, example: int, rule: str) -> list:
    """Probabilities [relation head][row][key] of one example's live tokens."""
    length = int(LENGTHS[example])
    joined = [
        [float(x) for head in vectors[example, :, t] for x in head.tolist()] for t in range(length)
    ]
    width = len(joined[0]) // heads
    found = []
    for head in range(heads):
        parts = [row[head * width : (head + 1) * width] for row in joined]
        rows = []
        for i in range(length):
            seen = range(i + 1) if rule == "causal" else range(length)
            scores = [
                math.exp(sum(a * b for a, b in zip(parts[i], parts[j], strict=True)) / width**0.5)
                for j in seen
            ]
            rows.append([score / sum(scores) for score in scores])
        found.append(rows)
    return found


def relations(student: dict, teacher: dict, rule: Rule, heads: int) -> Tensor:
    """The mean over relations, two query rows at a time."""
    found = [
        chunked_map_loss(
            attention_kl,
            *relation_vectors(student[name], heads),
            rows_of_vectors(*relation_vectors(teacher[name], heads)),
            ROWS,
            rule,
            count=int(ROWS.sum()),
            scores=2 * heads * 5,
        )
        for name in teacher
    ]
    return torch.stack(found).mean()


@pytest.mark.parametrize("rule", ["causal", "full"])
def test_relations_are_their_definition(rule):
    """Two heads of three beside four of six, and one key head beside three, split into two."""
    student = {"qq": normal(2, 2, 5, 3), "kk": normal(2, 1, 5, 6, seed=1)}
    teacher = {"qq": normal(2, 4, 5, 6, seed=2), "kk": normal(2, 3, 5, 2, seed=3)}
    wanted = 0.0
    for name in ("qq", "kk"):
        for example in (0, 1):
            p_maps = relation_by_loops(teacher[name], 2, example, rule)
            q_maps = relation_by_loops(student[name], 2, example, rule)
            for p_head, q_head in zip(p_maps, q_maps, strict=True):
                for p_row, q_row in zip(p_head, q_head, strict=True):
                    pairs = zip(p_row, q_row, strict=True)
                    wanted += sum(p * math.log(p / q) for p, q in pairs) / (2 * 2 * 8)
    found = relations(student, teacher, rule, 2)
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_relations_of_equal_vectors_are_at_zero_whatever_stands_at_padding():
    vectors = normal(2, 2, 5, 4).requires_grad_()
    noise = torch.where(ROWS[:, None, :, None], vectors.detach(), 7.0)
    found = relations({"vv": vectors}, {"vv": noise}, "causal", 4)
    found.backward()
    assert found.item() == pytest.approx(0.0, abs=1e-6)
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()
    assert not vectors.grad[~ROWS[:, None, :].expand(2, 2, 5)].any()


def test_a_relation_head_of_its_own_width_is_a_plain_head():
    vectors, visible = normal(2, 3, 5, 4), visible_keys(LENGTHS, 5, "full")
    log_probs = attention_log_probs(*relation_vectors(vectors, 3), visible)
    scores = (vectors @ vectors.transpose(-1, -2) / 2).masked_fill(~visible, -1e9)
    live = visible.expand_as(scores)
    torch.testing.assert_close(log_probs[live], scores.log_softmax(-1)[live])


def log_maps(heads: int, seed: int, visible: Tensor) -> Tensor:
    scores = normal(2, heads, 5, 5, seed=seed).masked_fill(~visible, -1e9)
    return scores.log_softmax(-1).masked_fill(~visible, -1e4)


def test_head_mean_compares_mean_maps_of_any_head_counts():
    visible = visible_keys(LENGTHS, 5, "causal")
    student, teacher = log_maps(2, 0, visible), log_maps(6, 1, visible)
    p, q = teacher.exp().mean(1), student.exp().mean(1)
    ratio = torch.where(visible[:, 0], p / q, 1.0).log()
    wanted = (p * ratio).sum(-1)[ROWS].mean()
    found = attention_head_mean(student, teacher, ROWS, visible)
    torch.testing.assert_close(found, wanted)
    assert attention_head_mean(teacher, teacher, ROWS, visible).item() == pytest.approx(
        0.0, abs=1e-6
    )


def test_head_mean_of_one_head_is_the_divergence_of_maps():
    visible = visible_keys(LENGTHS, 5, "full")
    student, teacher = log_maps(1, 0, visible), log_maps(1, 1, visible)
    torch.testing.assert_close(
        attention_head_mean(student, teacher, ROWS, visible),
        attention_kl(student, teacher, ROWS, visible),
    )


@pytest.mark.parametrize("rubbish", [-torch.inf, torch.nan])
def test_head_mean_never_reads_invisible_keys_or_dead_rows(rubbish):
    visible = visible_keys(LENGTHS, 5, "causal")
    student, teacher = log_maps(2, 0, visible).requires_grad_(), log_maps(3, 1, visible)
    clean = attention_head_mean(student, teacher, ROWS, visible)
    spoilt = torch.where(visible, student, rubbish)
    found = attention_head_mean(spoilt, teacher.masked_fill(~visible, rubbish), ROWS, visible)
    (gradient,) = torch.autograd.grad(found, student)
    assert found.item() == clean.item()
    assert gradient.isfinite().all()
