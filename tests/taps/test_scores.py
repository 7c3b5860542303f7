import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.taps.scores import INVISIBLE, attention_log_probs, visible_keys


def test_visible_keys_written_out():
    lengths = torch.tensor([3, 2])
    causal = visible_keys(lengths, 3, "causal").int().tolist()
    full = visible_keys(lengths, 3, "full").int().tolist()
    assert causal == [
        [[[1, 0, 0], [1, 1, 0], [1, 1, 1]]],
        [[[1, 0, 0], [1, 1, 0], [0, 0, 0]]],
    ]
    assert full == [
        [[[1, 1, 1], [1, 1, 1], [1, 1, 1]]],
        [[[1, 1, 0], [1, 1, 0], [0, 0, 0]]],
    ]


def test_log_probs_written_out():
    query = torch.tensor([[[[1.0], [2.0]]]])
    key = torch.tensor([[[[0.0], [1.0]]]])
    visible = visible_keys(torch.tensor([2]), 2, "causal")
    found = attention_log_probs(query, key, 0.5, visible)[0, 0]
    # Second row: scores 0 and 2 · 1 · 0.5 = 1.
    total = math.log(1 + math.e)
    assert torch.allclose(found, torch.tensor([[0.0, INVISIBLE], [-total, 1 - total]]))


def test_key_heads_serve_consecutive_query_heads():
    query, key = torch.randn(2, 6, 5, 4), torch.randn(2, 3, 5, 4)
    visible = visible_keys(torch.tensor([5, 3]), 5, "full")
    repeated = key.repeat_interleave(2, dim=1)
    found = attention_log_probs(query, key, 0.3, visible)
    assert torch.allclose(found, attention_log_probs(query, repeated, 0.3, visible), atol=1e-6)


@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=3),
    rule=st.sampled_from(["causal", "full"]),
    size=st.sampled_from([1e-3, 1.0, 1e4, 1e18]),
)
@settings(deadline=None, max_examples=30)
def test_rows_are_distributions_and_nothing_is_nan(lengths, rule, size):
    query = (torch.randn(len(lengths), 2, 6, 4) * size).requires_grad_()
    key = torch.randn(len(lengths), 1, 6, 4, requires_grad=True)
    visible = visible_keys(torch.tensor(lengths), 6, rule)
    found = attention_log_probs(query, key, 0.5, visible)
    live = visible.any(-1).expand(-1, 2, -1)
    assert torch.allclose(found.exp().sum(-1)[live], torch.tensor(1.0), atol=1e-5)
    assert (found[~visible.expand_as(found)] == INVISIBLE).all()
    assert (found[~visible.expand_as(found)].exp() == 0).all()
    found.exp().square().sum().backward()
    assert query.grad is not None
    assert query.grad.isfinite().all()
    assert (query.grad[~live] == 0).all()


def test_float32_under_autocast_and_from_half():
    query, key = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    visible = visible_keys(torch.tensor([4]), 4, "causal")
    plain = attention_log_probs(query, key, 0.35, visible)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = attention_log_probs(query, key, 0.35, visible)
    assert torch.equal(plain, inside)
    half = attention_log_probs(query.half(), key.half(), 0.35, visible)
    assert half.dtype == torch.float32
    assert torch.allclose(half, plain, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_invisible_survives_half_precision(dtype):
    invisible = torch.tensor(INVISIBLE).to(dtype)
    assert invisible.isfinite()
    assert invisible.exp() == 0
