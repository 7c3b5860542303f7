"""The order of batches, and batches from a store."""

from itertools import chain, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.student.order import WINDOW_BATCHES, BatchOrder
from pipeline.student.stream import StoreDataset, target_positions
from tests.captured import prepared, signal

segment_sizes = st.lists(st.integers(1, 30), min_size=1, max_size=12)


def order_of(sizes: list[int], *, batch: int = 4, pool: int = 2, seed: int = 0, **ranks: int):
    generator = np.random.default_rng(len(sizes))
    return BatchOrder(
        np.repeat(np.arange(len(sizes)), sizes),
        generator.integers(1, 50, sum(sizes)),
        batch_size=batch,
        pool_segments=pool,
        seed=seed,
        **ranks,
    )


@given(segment_sizes, st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=60)
def test_every_example_once_an_epoch_in_a_fixed_number_of_batches(sizes, batch, pool, epoch):
    order = order_of(sizes, batch=batch, pool=pool)
    order.set_epoch(epoch)
    batches = list(order)
    assert sorted(i for members in batches for i in members) == list(range(sum(sizes)))
    assert len(batches) == len(order)
    assert sorted(map(len, batches))[1:] == [batch] * (len(batches) - 1)


@given(segment_sizes, st.integers(1, 4), st.integers(1, 3), st.integers(2, 4))
@settings(max_examples=60)
def test_ranks_share_the_batches_of_one_rank_of_as_many_examples(sizes, batch, pool, ranks):
    if sum(sizes) < ranks:
        with pytest.raises(ConfigError, match=rf"{sum(sizes)} training examples for {ranks} ranks"):
            order_of(sizes, batch=batch, pool=pool, rank=0, ranks=ranks)
        return
    shares = [
        list(order_of(sizes, batch=batch, pool=pool, rank=rank, ranks=ranks))
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    assert all(members for share in shares for members in share)
    joined = [sorted(chain(*members)) for members in zip(*shares, strict=True)]
    assert sorted(chain(*joined)) == list(range(sum(sizes)))
    rest = sum(sizes) % (batch * ranks)
    if rest == 0 or rest >= ranks:
        together = order_of(sizes, batch=batch * ranks, pool=pool)
        assert joined == [sorted(members) for members in together]


def test_the_order_is_a_function_of_seed_and_epoch():
    first = order_of([9, 7, 12, 5])
    epochs = []
    for epoch in (0, 1, 2):
        first.set_epoch(epoch)
        epochs.append(list(first))
        assert epochs[-1] == list(first)
    assert len({str(epoch) for epoch in epochs}) == 3
    later = order_of([9, 7, 12, 5])
    later.set_epoch(2)
    assert list(later) == epochs[2]
    assert list(order_of([9, 7, 12, 5], seed=1)) != epochs[0]


def test_a_pool_of_segments_is_mixed_and_no_more_are_in_use():
    sizes = [20] * 12
    order = order_of(sizes, batch=4, pool=3)
    pools = [set(order.segment_order()[i : i + 3]) for i in range(0, 12, 3)]
    used = [{i // 20 for i in members} for members in order]
    for members in used:
        # A batch may carry what was left of the pool before.
        assert any(members <= before | after for before, after in pairwise([set(), *pools]))
    assert any(len(members) > 1 for members in used)


def test_batches_are_of_like_lengths():
    order = order_of([200, 200], batch=8, pool=2)
    lengths = order._length
    padding = sum(max(lengths[m]) * len(m) - sum(lengths[m]) for m in order)
    unsorted = [list(range(i, i + 8)) for i in range(0, 400, 8)]
    naive = sum(max(lengths[m]) * len(m) - sum(lengths[m]) for m in unsorted)
    assert padding < naive / 3
    assert WINDOW_BATCHES > 1


def test_a_batch_holds_the_rows_and_features_of_its_examples(captured):
    """Rows join by identity: the features beside a row are those of that row, in any order."""
    store = captured("bert")
    signals = [signal("hidden", 2, "float16"), signal("logits", None, "dense")]
    names = [one.name for one in signals]
    reader = store.pinned(signals)
    dataset = StoreDataset(reader, names)
    indices = [11, 0, 6, 3]
    batch = dataset.__getitems__(indices)
    lengths = batch["attention_mask"].sum(-1).tolist()
    assert lengths == dataset.length[indices].tolist()
    states = batch["features"][names[0]]["values"].split(lengths)
    for row, i in enumerate(indices):
        example = dataset.examples[i]
        segment = reader.read_segment(int(dataset.segment[i]), names)
        place = int(np.flatnonzero(segment.examples == example)[0])
        start, count = int(segment.offset[place]), int(segment.length[place])
        for column in ("input_ids", "token_type_ids", "loss_mask"):
            expected = torch.from_numpy(segment.tokens[column][start : start + count].astype("i8"))
            assert torch.equal(batch[column][row, :count].long(), expected)
            assert not batch[column][row, count:].any()
        values = segment.features[names[0]]["values"][start : start + count]
        assert torch.equal(states[row], torch.from_numpy(values))
        logits = segment.features[names[1]]["logits"][segment.slot[place]]
        assert torch.equal(batch["features"][names[1]]["logits"][row], torch.from_numpy(logits))
        assert batch["labels"][row] == reader.examples["label"][example]


def test_features_travel_in_the_dtypes_of_the_store(captured):
    store = captured("llama")
    signals = [signal("hidden", 2, "int8"), signal("attention", 1, "qk")]
    batch = StoreDataset(store.pinned(signals), [s.name for s in signals]).__getitems__([0])
    dtypes = {v.dtype for parts in batch["features"].values() for v in parts.values()}
    assert dtypes == {torch.int8, torch.float16}
    assert "labels" not in batch


@pytest.mark.parametrize("resumed_at", [0, 5])
def test_segments_are_read_once_ahead_and_not_before_they_are_wanted(
    resumed_at, tmp_path, monkeypatch
):
    """A run that resumes in mid-epoch reads nothing of the pools it skips; few stay in memory."""
    lengths = {"train": [8] * 80, "validation": [8], "test": [8]}
    store = prepared(tmp_path, "llama", layers=1, rows={"lengths": lengths})
    one = signal("hidden", 1, "float16")
    store.capture([one])
    reader = store.pinned([one])
    read: list[int] = []
    plain = type(reader).read_segment

    def counted(self, segment, signals=()):
        read.append(segment)
        return plain(self, segment, signals)

    monkeypatch.setattr(type(reader), "read_segment", counted)
    dataset = StoreDataset(reader, [one.name], pool_segments=2)
    order = BatchOrder(dataset.segment, dataset.length, batch_size=8, pool_segments=2, seed=0)
    plan = order.segment_order()
    dataset.read_ahead(plan)
    assert len(plan) == len(list(order)) == 10
    batches = list(order)[resumed_at:]
    for members in batches:
        dataset.__getitems__(members)
        assert len(dataset._reads) <= 5
    wanted = {int(dataset.segment[i]) for members in batches for i in members}
    first = min(plan.index(number) for number in wanted)
    assert wanted <= set(read) <= set(plan[first - first % 2 :])
    assert len(read) == len(set(read))


def test_a_split_without_the_signal_is_refused_by_name(captured):
    store = captured("llama")
    one = signal("hidden", 2, "float16")
    dataset = StoreDataset(store.pinned([one]), [one.name], split="test")
    with pytest.raises(Exception, match="not captured for split test; it was for train"):
        dataset.__getitems__([0])


def test_target_positions_written_out():
    batch = {
        "loss_mask": torch.tensor([[1, 1, 0, 1], [1, 1, 1, 0]]).bool(),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
    }
    expected = torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]]).bool()
    assert torch.equal(target_positions(batch), expected)
