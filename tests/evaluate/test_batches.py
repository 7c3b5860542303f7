"""Batches hold every row once, stay within their tokens and mask exactly the padding."""

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from pipeline.errors import ConfigError
from pipeline.evaluate.batches import batches, plan_batches


class Plain(nn.Module):
    def forward(self, input_ids, attention_mask=None):
        return input_ids, attention_mask


class WithTypes(nn.Module):
    def forward(self, input_ids, attention_mask=None, token_type_ids=None):
        return input_ids, attention_mask, token_type_ids


def rows(*ids):
    return datasets.Dataset.from_dict(
        {"input_ids": list(ids), "token_type_ids": [[1] * len(row) for row in ids]}
    )


@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_every_row_once_and_within_the_bound(lengths, batch_tokens):
    plan = plan_batches(lengths, batch_tokens)
    assert sorted(row for batch in plan for row in batch) == list(range(len(lengths)))
    for batch in plan:
        longest = max(lengths[row] for row in batch)
        assert len(batch) == 1 or len(batch) * longest <= batch_tokens
    firsts = [lengths[batch[0]] for batch in plan]
    assert firsts == sorted(firsts, reverse=True)


def test_a_batch_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="batch_tokens: found 0, expected at least 1"):
        plan_batches([3], 0)


def test_padding_is_on_the_right_and_masked():
    (batch,) = batches(
        rows([5], [6, 7, 8]),
        model=Plain(),
        pad_id=9,
        batch_tokens=10,
        device=torch.device("cpu"),
        label="x",
    )
    assert batch.rows == (1, 0)
    assert batch.input_ids.tolist() == [[6, 7, 8], [5, 9, 9]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.extra == {}


def test_rows_of_one_length_need_no_mask_and_the_model_decides_on_types():
    (batch,) = batches(
        rows([5, 6], [7, 8]),
        model=WithTypes(),
        pad_id=0,
        batch_tokens=10,
        device=torch.device("cpu"),
        label="x",
    )
    assert batch.attention_mask is None
    assert batch.extra["token_type_ids"].tolist() == [[1, 1], [1, 1]]
    assert set(batch.inputs()) == {"input_ids", "token_type_ids"}


def test_an_empty_split_is_refused():
    empty = datasets.Dataset.from_dict({"input_ids": []})
    with pytest.raises(ConfigError, match="test: found 0 rows"):
        next(
            batches(
                empty,
                model=Plain(),
                pad_id=0,
                batch_tokens=4,
                device=torch.device("cpu"),
                label="test",
            )
        )
