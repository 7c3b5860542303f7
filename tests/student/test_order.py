"""The order of batches: a pure function of seed and epoch, whatever the number of ranks."""

from itertools import chain, combinations, islice

import numpy as np
import pytest
from accelerate.data_loader import SkipBatchSampler
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import ConfigError
from pipeline.student.data.batch_order import WINDOW_BATCHES, BatchOrder

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


def shares_of(sizes: list[int], ranks: int, **options: int) -> list[list[list[int]]]:
    """The batches of each rank."""
    return [list(order_of(sizes, rank=rank, ranks=ranks, **options)) for rank in range(ranks)]


@given(segment_sizes, st.integers(1, 9), st.integers(1, 6), st.integers(0, 3))
@settings(max_examples=60)
def test_every_example_once_an_epoch_in_a_fixed_number_of_batches(sizes, batch, pool, epoch):
    order = order_of(sizes, batch=batch, pool=pool)
    order.set_epoch(epoch)
    batches = list(order)
    assert sorted(chain(*batches)) == list(range(sum(sizes)))
    assert len(batches) == len(order)
    whole, rest = divmod(sum(sizes), batch)
    shared = batch + rest
    ends = [shared // 2, shared - shared // 2] if whole else [rest]
    expected = [batch] * (whole - 1) + ends if rest else [batch] * whole
    assert sorted(map(len, batches)) == sorted(expected)


@given(segment_sizes, st.integers(1, 3), st.integers(1, 6), st.sampled_from([2, 3, 4]))
@settings(max_examples=80)
def test_ranks_share_the_batches_of_one_rank_of_as_many_examples(sizes, batch, pool, ranks):
    if sum(sizes) < ranks:
        with pytest.raises(ConfigError, match=rf"{sum(sizes)} training examples for {ranks} ranks"):
            order_of(sizes, batch=batch, pool=pool, rank=0, ranks=ranks)
        return
    shares = shares_of(sizes, ranks, batch=batch, pool=pool)
    lengths = order_of(sizes)._length
    assert all(members for share in shares for members in share)
    assert {len(share) for share in shares} == {len(order_of(sizes, batch=batch, ranks=ranks))}
    joined = [sorted(chain(*members)) for members in zip(*shares, strict=True)]
    assert sorted(chain(*joined)) == list(range(sum(sizes)))
    for members in chain(*shares):
        # Micro-batches are cut from it, each of like lengths.
        assert (np.diff(lengths[members]) <= 0).all()
    # One example a rank: a rest of fewer than ranks makes no batch of its own.
    if batch > 1 or sum(sizes) % ranks == 0:
        alone = order_of(sizes, batch=batch * ranks, pool=pool)
        assert joined == [sorted(members) for members in alone]


@given(segment_sizes, st.sampled_from([(2, 2), (2, 4), (4, 4)]), st.integers(0, 2))
@settings(max_examples=40)
def test_ranks_read_segments_of_their_own_until_the_first_lane_has_run_out(sizes, ranks, seed):
    ranks, pool = ranks
    if len(sizes) < pool:
        return
    orders = [
        order_of(sizes, batch=4, pool=pool, seed=seed, rank=rank, ranks=ranks)
        for rank in range(ranks)
    ]
    segment = orders[0]._segment
    by_rank = [[set(segment[members].tolist()) for members in order] for order in orders]
    lanes = orders[0]._deal(np.random.default_rng([seed, 0]))
    assert len(lanes) == pool
    counts = [sum(sizes[number] for number in lane) for lane in lanes]
    # Batches that the shortest lane fills; one stays behind for a rest to share with.
    body = max(0, min(counts) // (4 * ranks // pool) - 1)
    used = [set().union(*islice(batches, body)) for batches in by_rank]
    assert all(not one & other for one, other in combinations(used, 2))
    assert max(counts) - min(counts) <= max(sizes)


def test_where_ranks_do_not_divide_the_lanes_each_has_a_part_of_all():
    sizes = [12] * 6
    shares = shares_of(sizes, 2, batch=3, pool=4)
    assert order_of(sizes, batch=3, pool=4, ranks=2)._lanes == 3
    alone = order_of(sizes, batch=6, pool=4)
    for *ours, members in zip(*shares, alone, strict=True):
        assert ours == [members[0::2], members[1::2]]


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


@given(segment_sizes, st.integers(0, 20))
@settings(max_examples=20)
def test_what_is_left_after_skipping_is_the_rest_of_the_epoch(sizes, skipped):
    order = order_of(sizes)
    order.set_epoch(3)
    skipped = min(skipped, len(order))
    assert list(SkipBatchSampler(order, skip_batches=skipped)) == list(order)[skipped:]


@given(segment_sizes, st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=40)
def test_the_timetable_says_when_each_segment_is_needed(sizes, pool, ranks):
    if sum(sizes) < ranks:
        return
    order = order_of(sizes, batch=2, pool=pool, rank=ranks - 1, ranks=ranks)
    order.set_epoch(1)
    found = order.timetable()
    needed: dict[int, list[int]] = {}
    for i, members in enumerate(order):
        assert (found.batch[members] == i).all()
        for number in order._segment[members].tolist():
            needed.setdefault(number, []).append(i)
    assert found.segments.tolist() == sorted(needed, key=lambda number: (needed[number][0], number))
    for number, first, last in zip(found.segments, found.first, found.last, strict=True):
        assert (first, last) == (needed[number][0], needed[number][-1])
    others = np.setdiff1d(np.arange(sum(sizes)), list(chain(*order)))
    assert (found.batch[others] == -1).all()


@pytest.mark.parametrize(("count", "ranks"), [(4, 1), (7, 1), (7, 2), (12, 2)])
def test_what_the_next_epoch_needs_first_is_told_before_it_begins(count, ranks):
    order = order_of([24] * count, batch=8 // ranks, pool=4, rank=ranks - 1, ranks=ranks)
    told = order.next_segments()
    order.set_epoch(1)
    needed = order.timetable().segments.tolist()
    assert sorted(told) == sorted(needed[: len(told)])
    assert len(told) == 4 // ranks


@pytest.mark.parametrize(("ranks", "most"), [(1, 8), (2, 4), (4, 2)])
def test_a_pool_is_mixed_and_at_most_two_are_in_use(ranks, most):
    """A window may reach from one pool into the next; of ranks each has its part."""
    order = order_of([80] * 40, batch=32 // ranks, pool=4, rank=ranks - 1, ranks=ranks)
    found = order.timetable()
    body = range(len(order) - WINDOW_BATCHES)
    in_use = [((found.first <= i) & (found.last >= i)).sum() for i in body]
    assert found.together == 4 // ranks
    assert max(in_use) <= most
    mixed = [len({i // 80 for i in members}) for members in order]
    assert min(mixed) >= 4 // ranks


def test_batches_are_of_like_lengths():
    order = order_of([200, 200], batch=8, pool=2)
    lengths = order._length
    padding = sum(max(lengths[m]) * len(m) - sum(lengths[m]) for m in order)
    unsorted = [list(range(i, i + 8)) for i in range(0, 400, 8)]
    naive = sum(max(lengths[m]) * len(m) - sum(lengths[m]) for m in unsorted)
    assert padding < naive / 3


def test_a_split_without_examples_is_refused():
    none = np.zeros(0, np.int64)
    with pytest.raises(ConfigError, match="0 training examples for 1 ranks"):
        BatchOrder(none, none, batch_size=2, pool_segments=2, seed=0)
