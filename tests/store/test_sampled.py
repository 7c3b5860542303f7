"""Samples of the output: unbiased, as even as whole numbers allow, and a function of the row."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.store.forms.form import ArrayType, Geometry
from pipeline.store.forms.sampled import Sampled, row_offsets, systematic_counts

VOCAB = 12
LOGITS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 5), st.just(VOCAB)),
    elements=st.floats(-30, 30, width=32),
)


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    return shifted / shifted.sum(-1, keepdims=True)


def drawn(form: Sampled, logits: np.ndarray) -> np.ndarray:
    """The ids that the form's stored bytes say."""
    return form.decode(form.encode({"logits": logits}, None), None)["samples"]


def counts_of(ids: np.ndarray) -> np.ndarray:
    return np.stack([np.bincount(row, minlength=VOCAB) for row in ids.astype(np.int64)])


@settings(max_examples=40)
@given(LOGITS, st.integers(1, 40))
def test_an_id_is_drawn_within_one_of_its_share(logits, n):
    ids = drawn(Sampled(n), logits)
    assert ids.shape == (len(logits), n)
    assert (np.diff(ids.astype(np.int64), axis=-1) >= 0).all()
    assert (np.abs(counts_of(ids) - n * softmax(logits)) < 1 + 1e-9).all()


@pytest.mark.parametrize("n", [1, 3, 10])
def test_over_all_offsets_the_mean_of_the_counts_is_the_share(n):
    """Unbiased: offsets on a grid finer than any probability, so the mean is exact but for it."""
    probability = softmax(np.random.default_rng(0).standard_normal((1, VOCAB)) * 2)
    cumulative = np.cumsum(probability, axis=-1)
    cumulative /= cumulative[:, -1:]
    offsets = (np.arange(20000) + 0.5) / 20000
    counts = systematic_counts(np.repeat(cumulative, len(offsets), 0), offsets, n)
    assert (counts.sum(-1) == n).all()
    np.testing.assert_allclose(counts.mean(0) / n, probability[0], atol=1.1e-4)


def test_over_many_rows_the_samples_are_unbiased():
    """Rows that differ a little: their offsets are hashes, and as good as independent."""
    random = np.random.default_rng(0)
    logits = random.standard_normal(VOCAB) * 2 + random.standard_normal((8000, VOCAB)) * 1e-3
    ids = drawn(Sampled(2), logits.astype(np.float32))
    found = counts_of(ids).mean(0) / 2
    np.testing.assert_allclose(found, softmax(logits).mean(0), atol=0.02)


def test_offsets_are_even_and_change_with_every_bit():
    logits = np.random.default_rng(0).standard_normal((5000, 7)).astype(np.float32)
    offsets = row_offsets(logits)
    assert (offsets >= 0).all()
    assert (offsets < 1).all()
    shares = np.histogram(offsets, bins=10, range=(0, 1))[0] / len(offsets)
    np.testing.assert_allclose(shares, 0.1, atol=0.02)
    changed = logits.copy()
    changed[:, 3] = np.nextafter(changed[:, 3], np.float32(9))
    assert np.abs(row_offsets(changed) - offsets).mean() > 0.2
    swapped = row_offsets(logits[:, ::-1].copy())
    assert np.abs(swapped - offsets).mean() > 0.2


@settings(max_examples=25)
@given(LOGITS, st.integers(1, 20))
def test_numpy_and_torch_draw_the_same(logits, n):
    form = Sampled(n)
    from_numpy = form.encode({"logits": logits}, None)
    from_torch = form.encode({"logits": torch.from_numpy(logits)}, None)
    np.testing.assert_array_equal(from_numpy["id_gaps"], from_torch["id_gaps"].numpy(), strict=True)
    decoded = form.decode(from_torch, None)["samples"]
    assert decoded.dtype == torch.int64
    np.testing.assert_array_equal(form.decode(from_numpy, None)["samples"], decoded.numpy())


def test_a_row_draws_the_same_in_any_batch(monkeypatch):
    logits = np.random.default_rng(1).standard_normal((9, VOCAB)).astype(np.float32)
    together = drawn(Sampled(8), logits)
    alone = [drawn(Sampled(8), row[None])[0] for row in logits[::-1]]
    np.testing.assert_array_equal(together, np.stack(alone)[::-1])
    monkeypatch.setattr("pipeline.store.forms.sampled.CHUNK_LOGITS", 2 * VOCAB)
    np.testing.assert_array_equal(together, drawn(Sampled(8), logits))


def test_a_row_that_is_not_finite_stops_nobody():
    logits = np.zeros((3, VOCAB), np.float32)
    logits[1, 4] = np.nan
    ids = drawn(Sampled(6), logits)
    np.testing.assert_array_equal(ids[0], ids[2])
    assert drawn(Sampled(6), logits[:0]).shape == (0, 6)


@pytest.mark.parametrize(("vocab", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_ids_fit_their_vocabulary(vocab, dtype):
    assert Sampled(3).arrays(Geometry(vocab=vocab)) == {"id_gaps": ArrayType(dtype, (3,))}
    logits = np.zeros((1, vocab), np.float32)
    logits[0, -1] = 100
    encoded = Sampled(3).encode({"logits": logits}, None)
    assert encoded["id_gaps"].dtype == dtype
    assert Sampled(3).decode(encoded, None)["samples"].tolist() == [[vocab - 1] * 3]
