"""Earlier versions of forms decode to what the present ones do, and ids survive as gaps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.store.codec import encode_shard
from pipeline.store.forms.form import Geometry, Part, identity
from pipeline.store.forms.ids import gap_part, gaps_of, ids_of
from pipeline.store.forms.registry import FORMS, OLDER, build_form

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
    assert Part(str(gaps.dtype), gaps.shape[1:]) == gap_part(vocab, ids.shape[1])
    by_torch = gaps_of(torch.from_numpy(ids), vocab)
    np.testing.assert_array_equal(gaps, by_torch.numpy(), strict=True)
    np.testing.assert_array_equal(ids_of(gaps), ids, strict=True)
    np.testing.assert_array_equal(ids_of(by_torch).numpy(), ids, strict=True)


@pytest.mark.parametrize("key", OLDER)
@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_an_older_version_decodes_to_the_same(key, library):
    kind, name, version = key
    old, new = build_form(kind, name, {}, version), build_form(kind, name, {})
    assert (old.version, new.version) == (version, FORMS[kind][name].version)
    assert version < new.version
    assert identity(old) != identity(new)
    logits = np.random.default_rng(0).standard_normal((5, GEOMETRY.vocab)).astype(np.float32)
    stored = old.encode({"logits": library(logits)}, None)
    found = {key: Part(str(np.asarray(x).dtype), x.shape[1:]) for key, x in stored.items()}
    assert found == old.parts(GEOMETRY)
    expected = new.decode(new.encode({"logits": library(logits)}, None), None)
    decoded = old.decode(stored, None)
    assert decoded.keys() == expected.keys()
    for part, values in expected.items():
        np.testing.assert_array_equal(np.asarray(decoded[part]), np.asarray(values), strict=True)


@pytest.mark.parametrize("name", ["topk", "sampled"])
@pytest.mark.parametrize("vocab", [2048, 70_000])
def test_gaps_are_fewer_bytes_than_ids(name, vocab):
    """Logits of a few likely tokens and a long tail, in the order of a vocabulary by rarity."""
    random = np.random.default_rng(0)
    logits = -np.log(np.arange(vocab) + 2.7) + random.standard_normal((64, vocab)) * 1.5

    def stored(version: int) -> int:
        form = build_form("logits", name, {}, version)
        parts = form.encode({"logits": logits.astype(np.float32)}, None)
        [ids] = [part for key, part in parts.items() if key.startswith("id")]
        return len(encode_shard(ids, 64))

    assert stored(2) < 0.88 * stored(1)
