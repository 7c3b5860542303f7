"""Attention compared some rows at a time: value and gradient of all at once, never their memory."""

import pytest
import torch
from torch import Tensor

from pipeline.student.align.chunked import chunked_map_loss
from pipeline.student.losses.attention import attention_head_mean, attention_kl, relation_vectors
from pipeline.taps.scores import (
    ALL,
    Rule,
    attention_log_probs,
    first_pairs,
    rows_of_vectors,
    visible_keys,
)
from tests.student.test_losses_chunked import Sizes

LENGTHS = torch.tensor([7, 3, 1])
SEQ, WIDTH, COUNT = 7, 4, 11
LIVE = torch.arange(SEQ) < LENGTHS[:, None]
SCORES = {"one-row": 1, "rows": 2 * 4 * SEQ, "examples": 2 * 4 * SEQ * SEQ, "whole": 10**6}
LOSSES = {"kl": (attention_kl, 4), "head_mean": (attention_head_mean, 6)}


def vectors(heads: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, heads, SEQ, WIDTH, generator=generator).to(dtype)


def plain(loss, query: Tensor, key: Tensor, teacher: tuple[Tensor, Tensor], rule: Rule) -> Tensor:
    visible = visible_keys(LENGTHS, SEQ, rule)
    ours = attention_log_probs(query, key, 0.5, visible)
    return loss(ours, attention_log_probs(*teacher, 0.4, visible), LIVE, visible, COUNT)


def same_gradients(found: Tensor, wanted: Tensor, inputs: list[Tensor], rtol=1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    ours, theirs = torch.autograd.grad(found, inputs), torch.autograd.grad(wanted, inputs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= rtol * other.norm()


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("rule", ["causal", "full"])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("name", LOSSES)
def test_chunks_are_all_rows_at_once(name, kv_heads, rule, scores):
    loss, teacher_heads = LOSSES[name]
    query, key = vectors(4, 0).requires_grad_(), vectors(kv_heads, 1).requires_grad_()
    teacher = vectors(teacher_heads, 2), vectors(teacher_heads // 2, 3)
    found = chunked_map_loss(
        loss, query, key, 0.5, rows_of_vectors(*teacher, 0.4), LIVE, rule,
        count=COUNT, teacher_heads=teacher_heads, scores=scores,
    )  # fmt: skip
    same_gradients(found, plain(loss, query, key, teacher, rule), [query, key])


@pytest.mark.parametrize("scores", SCORES.values(), ids=SCORES)
@pytest.mark.parametrize("rule", ["causal", "full"])
def test_a_relation_adds_up_both_uses_of_its_vectors(rule, scores):
    ours, theirs = vectors(4, 0).requires_grad_(), vectors(6, 1)
    split, told = relation_vectors(ours, 2), relation_vectors(theirs, 2)
    found = chunked_map_loss(
        attention_kl, *split, rows_of_vectors(*told), LIVE, rule,
        count=COUNT, teacher_heads=2, scores=scores,
    )  # fmt: skip
    visible = visible_keys(LENGTHS, SEQ, rule)
    maps = [attention_log_probs(*one, visible) for one in (split, told)]
    same_gradients(found, attention_kl(*maps, LIVE, visible, COUNT), [ours])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_vectors_of_half_precision_are_widened_and_nothing_underflows(dtype):
    """A count of a million: a row's share of it is below what float16 holds."""
    count = 10**6
    teacher = rows_of_vectors(vectors(4, 2), vectors(2, 3), 0.4)
    found = []
    for kind in (dtype, torch.float32):
        query, key = (vectors(heads, s, dtype).to(kind) for heads, s in ((4, 0), (2, 1)))
        inputs = [query.requires_grad_(), key.requires_grad_()]
        with torch.autocast("cpu", dtype, enabled=kind == dtype):
            value = chunked_map_loss(
                attention_kl, *inputs, 0.5, teacher, LIVE, "causal", count=count, scores=60
            )
        gradients = torch.autograd.grad(value * 65536.0, inputs)
        assert [one.dtype for one in gradients] == [kind, kind]
        found.append((value, gradients))
    (narrow, ours), (wide, theirs) = found
    assert narrow.item() == pytest.approx(wide.item(), rel=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() < 0.01 * other.norm()


@pytest.mark.parametrize("scores", [1, 10**6])
def test_equal_sides_are_at_zero_and_padding_gets_no_gradient(scores):
    query, key = vectors(4, 0).requires_grad_(), vectors(2, 1).requires_grad_()
    teacher = rows_of_vectors(query.detach() + 0.0, key.detach(), 0.5)
    same = chunked_map_loss(
        attention_kl, query, key, 0.5, teacher, LIVE, "full", count=torch.tensor(COUNT),
        scores=scores,
    )  # fmt: skip
    assert same.item() == 0.0
    other = rows_of_vectors(vectors(4, 2), vectors(2, 3), 0.5)
    loss = chunked_map_loss(
        attention_kl, query, key, 0.5, other, LIVE, "full", count=COUNT, scores=scores
    )
    for one in torch.autograd.grad(loss, [query, key]):
        assert one.isfinite().all()
        dead = ~LIVE[:, None].expand(one.shape[:3])
        assert not one[dead].any()
        assert one[~dead].any()


def test_no_row_alive_is_zero():
    query, key = vectors(4, 0).requires_grad_(), vectors(2, 1).requires_grad_()
    none = torch.zeros_like(LIVE)
    loss = chunked_map_loss(
        attention_kl, query, key, 0.5, rows_of_vectors(query.detach(), key.detach(), 0.4), none,
        "causal", count=torch.tensor(0),
    )  # fmt: skip
    loss.backward()
    assert loss.item() == 0.0
    assert query.grad is not None
    assert not query.grad.any()


def test_without_gradients_none_are_found():
    query, key = vectors(4, 0).requires_grad_(), vectors(2, 1)
    teacher = rows_of_vectors(vectors(4, 2), vectors(2, 3), 0.4)
    with torch.no_grad(), Sizes() as sizes:
        loss = chunked_map_loss(
            attention_kl, query, key, 0.5, teacher, LIVE, "causal", count=COUNT, scores=60
        )
    assert not loss.requires_grad
    assert tuple(query.shape) not in sizes.shapes


def test_no_more_than_a_chunk_of_scores_is_ever_made():
    batch, heads, seq, width, scores = 3, 4, 40, 2, 4 * 40 * 5
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, seq, width, generator=generator).requires_grad_()
    key = torch.randn(batch, heads, seq, width, generator=generator).requires_grad_()
    live = torch.ones(batch, seq, dtype=torch.bool)
    teacher = rows_of_vectors(query.detach() * 2, key.detach(), 0.4)
    with Sizes() as sizes:
        chunked_map_loss(
            attention_kl, query, key, 0.5, teacher, live, "full", count=batch * seq, scores=scores
        ).backward()
    assert sizes.largest <= max(scores, query.numel()) < batch * heads * seq * seq
    assert (1, heads, 5, seq) in sizes.shapes


@pytest.mark.parametrize("rule", ["causal", "full"])
def test_rows_of_pairs_begin_where_the_pairs_before_them_end(rule):
    visible = visible_keys(LENGTHS, SEQ, rule)[:, 0]
    where = visible.flatten().cumsum(0).view_as(visible) - 1
    first = first_pairs(LENGTHS, SEQ, rule)
    found = first[:, :, None] + torch.arange(SEQ)
    assert torch.equal(found[visible], where[visible])


def test_visible_keys_of_some_rows():
    for rule in ("causal", "full"):
        whole = visible_keys(LENGTHS, SEQ, rule)
        assert torch.equal(visible_keys(LENGTHS, SEQ, rule, slice(2, 5)), whole[:, :, 2:5])
        assert torch.equal(visible_keys(LENGTHS, SEQ, rule, ALL), whole)
