"""A plan with text that was added: what was there stays where it was."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.axes import SPLITS
from tests.store.test_segment_plan import CAPACITY, CORPORA, FEW, LENGTHS, planned

COLUMNS = ("split", "row", "start", "length", "segment", "slot")


@FEW
@given(
    CORPORA,
    st.lists(LENGTHS, min_size=1, max_size=3),
    st.integers(0, 3),
    st.sampled_from([1.0, 0.5, 0.01]),
)
def test_the_first_parts_lie_where_they_lie_without_the_rest(lengths, added, seed, fraction):
    options = {"seed": seed, "fraction": fraction}
    parts = [len(lengths["train"])]
    before = planned(lengths, **options)
    assert before.parts == (len(before.segments_of("train")),)
    grown_lengths = dict(lengths)
    for more in added:
        parts.append(len(more))
        grown_lengths["train"] = np.concatenate([grown_lengths["train"], more])
        plan = planned(grown_lengths, **options, parts=parts)
        train = before.split == 0
        for column in COLUMNS:
            np.testing.assert_array_equal(
                getattr(plan, column)[: train.sum()], getattr(before, column)[train]
            )
        assert plan.parts[:-1] == before.parts
        assert sum(plan.parts) == len(plan.segments_of("train"))
        before = plan


@FEW
@given(CORPORA, LENGTHS, st.integers(0, 3))
def test_with_parts_every_row_lies_once_in_a_segment_of_its_part(lengths, more, seed):
    parts = (len(lengths["train"]), len(more))
    lengths = lengths | {"train": np.concatenate([lengths["train"], more])}
    plan = planned(lengths, seed=seed, parts=parts)
    places = set(zip(plan.split.tolist(), plan.row.tolist(), strict=True))
    assert places == {(c, r) for c, split in enumerate(SPLITS) for r in range(len(lengths[split]))}
    assert len(plan.row) == len(places)
    train = plan.split == 0
    of_first = plan.row[train] < parts[0]
    np.testing.assert_array_equal(of_first, plan.segment[train] < plan.parts[0])
    assert (plan.start + plan.length <= (plan.segment + 1) * CAPACITY).all()


@FEW
@given(CORPORA, st.integers(0, 3))
def test_one_part_is_none(lengths, seed):
    plain, named = (
        planned(lengths, seed=seed, parts=parts) for parts in ((), (len(lengths["train"]),))
    )
    for column in (*COLUMNS, "segment_split", "parts"):
        np.testing.assert_array_equal(getattr(plain, column), getattr(named, column))


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"fraction": 0.5}, (5, 2)), ({"limit": 12}, (10, 2)), ({"limit": 4}, (4, 0)),
     ({"fraction": 0.5, "limit": 6}, (5, 1))],
)  # fmt: skip
def test_a_share_is_of_each_part_and_a_limit_of_all(options, kept):
    lengths = {"train": np.full(14, 6)}
    plan = planned(lengths, parts=(10, 4), **options)
    assert ((plan.row < 10).sum(), (plan.row >= 10).sum()) == kept
    assert plan.parts == tuple(-(-count // 2) for count in kept)
