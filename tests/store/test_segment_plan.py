"""The plan: every example once, whole, in one segment of its split; a function of its input."""

from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.axes import SPLITS
from pipeline.errors import ConfigError
from pipeline.store.plan import Plan, bucketed_batches, make_plan

CAPACITY = 12
LENGTHS = st.lists(st.integers(1, CAPACITY), max_size=30).map(lambda x: np.array(x, dtype=np.int64))
CORPORA = st.fixed_dictionaries(
    {"train": LENGTHS.filter(len), "validation": LENGTHS, "test": LENGTHS}
)
FEW = settings(max_examples=60, deadline=None)


def planned(lengths, **options) -> Plan:
    return make_plan(lengths, **{"segment_tokens": CAPACITY, "seed": 0, **options})


@FEW
@given(CORPORA, st.integers(0, 5))
def test_examples_lie_once_and_whole_in_a_segment_of_their_split(lengths, seed):
    plan = planned(lengths, seed=seed)
    expected = {(c, r) for c, split in enumerate(SPLITS) for r in range(len(lengths[split]))}
    places = list(zip(plan.split.tolist(), plan.row.tolist(), strict=True))
    assert len(places) == len(expected)
    assert set(places) == expected
    for i, (code, row) in enumerate(places):
        assert plan.length[i] == lengths[SPLITS[code]][row]
        assert plan.segment_split[plan.segment[i]] == code
    end = plan.start + plan.length
    assert (plan.start >= plan.segment * CAPACITY).all()
    assert (end <= (plan.segment + 1) * CAPACITY).all()
    # In store order, without gaps inside a segment and without overlap anywhere.
    same = plan.segment[1:] == plan.segment[:-1]
    assert (plan.start[1:][same] == end[:-1][same]).all()
    assert (plan.segment[1:][~same] == plan.segment[:-1][~same] + 1).all()


@FEW
@given(CORPORA)
def test_a_segment_finds_its_examples_by_slot(lengths):
    plan = planned(lengths)
    covered = 0
    for segment in range(plan.segments):
        members = plan.in_segment(segment)
        count = members.stop - members.start
        assert count > 0
        assert plan.slot[members].tolist() == list(range(count))
        assert (plan.segment[members] == segment).all()
        assert count <= plan.examples_per_segment
        covered += count
    assert covered == len(plan.row)
    by_split = [segment for split in SPLITS for segment in plan.segments_of(split)]
    assert sorted(by_split) == list(range(plan.segments))


@FEW
@given(CORPORA, st.integers(0, 3))
def test_the_plan_is_a_function_of_its_arguments(lengths, seed):
    first, second = (astuple(planned(lengths, seed=seed)) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_seed_permutes_and_splits_do_not_share_an_order():
    lengths = {split: np.ones(20, np.int64) for split in SPLITS}
    rows = [planned(lengths, seed=seed).row.reshape(3, 20) for seed in (0, 1)]
    assert (rows[0] != rows[1]).any()
    assert (rows[0][1] != rows[0][2]).any()
    assert (rows[0][0] != np.arange(20)).any()


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, 20),
        ({"fraction": 0.1}, 2),
        ({"fraction": 0.001}, 1),
        ({"limit": 3}, 3),
        ({"fraction": 0.5, "limit": 3}, 3),
        ({"fraction": 0.1, "limit": 9}, 2),
    ],
)
def test_fraction_and_limit_cut_training_alone(options, kept):
    lengths = {split: np.ones(20, np.int64) for split in SPLITS}
    plan = planned(lengths, **options)
    assert np.bincount(plan.split).tolist() == [kept, 20, 20]
    # A smaller transfer set is the beginning of a larger one.
    assert plan.row[:kept].tolist() == planned(lengths).row[:kept].tolist()


@pytest.mark.parametrize(
    ("lengths", "match"),
    [
        ({"train": [], "test": [1]}, "0 training examples"),
        ({"train": [1, 13]}, "segment_tokens: 12, but an example of train has 13 tokens"),
        ({"train": [1], "test": [2, 0]}, "example 1 of test has 0 tokens"),
    ],
)
def test_what_cannot_be_planned_is_refused(lengths, match):
    with pytest.raises(ConfigError, match=match):
        planned({split: np.array(x, np.int64) for split, x in lengths.items()})


@FEW
@given(LENGTHS, st.integers(1, 40))
def test_batches_cover_a_segment_within_their_tokens(lengths, batch_tokens):
    batches = bucketed_batches(lengths, batch_tokens)
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(lengths)))
    for batch in batches:
        padded = int(lengths[batch].max()) * len(batch)
        assert padded <= batch_tokens or len(batch) == 1
    again = bucketed_batches(lengths.copy(), batch_tokens)
    assert [b.tolist() for b in batches] == [b.tolist() for b in again]
