"""Top-k logits: softmax over the whole vocabulary first, and the mass of the rest never lost."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, logsumexp

from pipeline.store.forms.form import Geometry
from pipeline.store.forms.topk import TopK

VOCAB = 40
TEMPERATURES = (1.0, 2.0, 0.5)


def logits_of(seed: int, scale: float, tokens: int = 3, vocab: int = VOCAB) -> np.ndarray:
    """Distinct logits, so that which are the largest is not a matter of taste."""
    return (np.random.default_rng(seed).standard_normal((tokens, vocab)) * scale).astype(np.float32)


CASES = st.builds(logits_of, st.integers(0, 10**6), st.sampled_from([0.01, 1.0, 10.0, 100.0]))


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_ids_and_log_probs_are_those_of_the_whole_softmax(logits):
    form = TopK(k=7, temperatures=TEMPERATURES)
    decoded = form.decode(form.encode({"logits": logits}, None), None)
    exact = log_softmax(logits.astype(np.float64), axis=-1)
    for row, ids in enumerate(decoded["ids"]):
        assert set(ids) == set(np.argsort(-logits[row])[:7])
        assert (np.diff(ids) > 0).all()
    kept = np.take_along_axis(exact, decoded["ids"], axis=-1)
    np.testing.assert_allclose(decoded["log_probs"], kept, rtol=2.0**-10, atol=2e-5)


@settings(max_examples=40, deadline=None)
@given(CASES)
def test_the_tail_is_right_at_every_temperature(logits):
    form = TopK(k=7, temperatures=TEMPERATURES)
    decoded = form.decode(form.encode({"logits": logits}, None), None)
    exact = log_softmax(logits.astype(np.float64), axis=-1)
    for i, temperature in enumerate(TEMPERATURES):
        tempered = log_softmax(exact / temperature, axis=-1)
        true_tail = 1 - np.exp(np.take_along_axis(tempered, decoded["ids"], axis=-1)).sum(-1)
        log_probs = decoded["log_probs"] / temperature - decoded["log_normalizer"][:, i, None]
        tail = 1 - np.exp(log_probs.astype(np.float64)).sum(-1)
        # float16 log-probabilities err by 2^-11 of their size.
        bound = 2.0**-10 * (np.abs(decoded["log_probs"]).max(-1) / temperature + 1)
        assert (np.abs(tail - true_tail) <= bound).all()


def test_it_is_not_renormalised():
    form = TopK(k=4)
    decoded = form.decode(form.encode({"logits": np.zeros((1, VOCAB), np.float32)}, None), None)
    np.testing.assert_allclose(np.exp(decoded["log_probs"]).sum(), 4 / VOCAB, rtol=1e-3)
    np.testing.assert_allclose(decoded["log_normalizer"], 0, atol=1e-6)


def test_a_constant_shift_of_the_logits_changes_nothing():
    form = TopK(k=7, temperatures=TEMPERATURES)
    logits = np.round(logits_of(1, 10.0) * 8) / 8
    plain = form.encode({"logits": logits}, None)
    shifted = form.encode({"logits": logits + 4096}, None)
    for key, value in plain.items():
        np.testing.assert_array_equal(value, shifted[key])


def test_large_logits_do_not_overflow():
    form = TopK(k=2, temperatures=(0.1,))
    logits = np.array([[3e4, -3e4, 0.0, 1.0]], np.float32)
    encoded = form.encode({"logits": logits}, None)
    assert encoded["log_probs"][0].max() == 0
    assert np.isfinite(encoded["log_normalizer"]).all()


@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_torch_agrees_with_numpy(scale):
    form = TopK(k=7, temperatures=TEMPERATURES)
    logits = logits_of(0, scale, tokens=8)
    by_numpy = form.encode({"logits": logits}, None)
    by_torch = form.encode({"logits": torch.from_numpy(logits)}, None)
    np.testing.assert_array_equal(by_numpy["id_gaps"], by_torch["id_gaps"].numpy())
    for key in ("log_probs", "log_normalizer"):
        assert by_numpy[key].dtype == by_torch[key].numpy().dtype
        # `exp` and `log` of the two libraries differ in the last bit.
        np.testing.assert_allclose(by_numpy[key], by_torch[key].numpy(), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("vocab", "dtype"), [(65536, "uint16"), (65537, "uint32"), (151936, "uint32")]
)
@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_ids_of_large_vocabularies_survive(vocab, dtype, library):
    """The last id of each: a sixteenth bit too few, or a seventeenth, would lose it."""
    logits = np.zeros((1, vocab), np.float32)
    logits[0, [0, vocab - 1]] = 5.0
    form = TopK(k=2)
    encoded = form.encode({"logits": library(logits)}, None)
    assert str(np.asarray(encoded["id_gaps"]).dtype) == dtype
    assert form.arrays(Geometry(vocab=vocab))["id_gaps"].dtype == dtype
    assert np.asarray(form.decode(encoded, None)["ids"]).tolist() == [[0, vocab - 1]]


def test_the_normaliser_of_one_temperature_does_not_give_another():
    """Why each is stored: the same top-k and tail at T=1, another tail at T=2."""
    form = TopK(k=1, temperatures=(1.0, 2.0))
    flat = np.log(np.array([[0.5, 0.25, 0.25]], np.float32))
    peaked = np.log(np.array([[0.5, 0.4999, 0.0001]], np.float32))
    first, second = (form.encode({"logits": x}, None) for x in (flat, peaked))
    np.testing.assert_array_equal(first["log_probs"], second["log_probs"])
    for encoded, logits in ((first, flat), (second, peaked)):
        np.testing.assert_allclose(
            encoded["log_normalizer"][0, 1], logsumexp(logits / 2), rtol=1e-5
        )
    assert abs(first["log_normalizer"][0, 1] - second["log_normalizer"][0, 1]) > 0.05
