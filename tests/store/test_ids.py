"""Ids survive as gaps, which take fewer bytes; stores that hold the ids themselves are read."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.store.codec import encode_shard
from pipeline.store.forms.form import ArrayType, Geometry
from pipeline.store.forms.ids import GAPS, IDS, gap_type, gaps_of, ids_of
from pipeline.store.forms.registry import build_form

FEW = settings(max_examples=40, deadline=None)
GEOMETRY = Geometry(vocab=300)


@FEW
@given(
    hnp.arrays(
        np.int64, st.tuples(st.integers(0, 4), st.integers(1, 9)), elements=st.integers(0, 99)
    )
)
@pytest.mark.parametrize("vocab", [100, 2**16 + 1])
def test_gaps_are_their_ids(vocab, ids):
    ids = np.sort(ids, axis=-1)
    gaps = gaps_of(ids, vocab)
    assert ArrayType(str(gaps.dtype), gaps.shape[1:]) == gap_type(vocab, ids.shape[1])
    by_torch = gaps_of(torch.from_numpy(ids), vocab)
    np.testing.assert_array_equal(gaps, by_torch.numpy(), strict=True)
    np.testing.assert_array_equal(ids_of({GAPS: gaps}), ids, strict=True)
    np.testing.assert_array_equal(ids_of({GAPS: by_torch}).numpy(), ids, strict=True)


@pytest.mark.parametrize("name", ["topk", "sampled"])
@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_version_1_decodes_to_the_same(name, library):
    form = build_form("logits", name, {})
    earlier = form.as_written_by(1)
    assert earlier is not None
    assert (earlier.version, form.version) == (1, 2)
    assert form.as_written_by(2) == form
    assert form.as_written_by(3) is None
    logits = np.random.default_rng(0).standard_normal((5, GEOMETRY.vocab)).astype(np.float32)
    stored = form.encode({"logits": library(logits)}, None)
    gaps = stored.pop(GAPS)
    ids = np.cumsum(np.asarray(gaps).astype(np.int64), axis=-1).astype(np.uint16)
    by_id = {IDS: library(ids), **stored}
    found = {key: ArrayType(str(np.asarray(x).dtype), x.shape[1:]) for key, x in by_id.items()}
    assert found == earlier.arrays(GEOMETRY)
    expected = form.decode({GAPS: gaps, **stored}, None)
    decoded = earlier.decode(by_id, None)
    assert decoded.keys() == expected.keys()
    for part, values in expected.items():
        np.testing.assert_array_equal(np.asarray(decoded[part]), np.asarray(values), strict=True)


@pytest.mark.parametrize("name", ["topk", "sampled"])
@pytest.mark.parametrize("vocab", [2048, 70_000])
def test_gaps_are_fewer_bytes_than_ids(name, vocab):
    """Logits of a few likely tokens and a long tail, in the order of a vocabulary by rarity."""
    random = np.random.default_rng(0)
    logits = -np.log(np.arange(vocab) + 2.7) + random.standard_normal((64, vocab)) * 1.5
    gaps = build_form("logits", name, {}).encode({"logits": logits.astype(np.float32)}, None)[GAPS]
    ids = np.cumsum(gaps, axis=-1, dtype=np.int64).astype(gaps.dtype)
    assert len(encode_shard(gaps, 64)) < 0.88 * len(encode_shard(ids, 64))
