"""Every form says in code how far it may be off, and is never further off."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.store.forms.form import Channels, Form
from pipeline.store.forms.registry import FORMS, build_form

WIDTH, VOCAB = 5, 60
MEAN = np.array([0.0, 1.0, 300.0, -2.0, 0.5], np.float32)
DEVIATION = np.array([1.0, 0.5, 50.0, 1e-2, 2.0], np.float32)
EVERY_FORM = [form() for form in FORMS.values()]
EVERY_FORM[EVERY_FORM.index(build_form("logits", "topk", {}))] = build_form(
    "logits", "topk", {"k": 7, "temperatures": [1.0, 3.0]}
)


def channels(kind: type) -> Channels:
    if kind is torch.Tensor:
        return Channels(torch.from_numpy(MEAN), torch.from_numpy(DEVIATION))
    return Channels(MEAN, DEVIATION)


def values(seed: int, scale: float) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    shapes = {
        "hidden": (6, WIDTH),
        "head_input": (6, WIDTH),
        "query": (6, 4, 3),
        "key": (6, 2, 3),
        "value": (6, 2, 3),
        "logits": (6, VOCAB),
    }
    found = {name: random.standard_normal(shape) * scale for name, shape in shapes.items()}
    found["probability"] = random.random((6, 4)) ** 3
    return {name: value.astype(np.float32) for name, value in found.items()}


def shares(form: Form, true: dict, decoded: dict, of: Channels) -> dict[str, float]:
    """The largest error of each decoded array as a part of the one stated."""
    found = {}
    for name, error in form.errors(true, decoded, of).items():
        off, stated = np.asarray(error.found), np.broadcast_to(error.stated, error.found.shape)
        found[name] = float(np.where(off > stated, 2.0, 0.0).max())
    return found


@pytest.mark.parametrize("form", EVERY_FORM, ids=lambda form: f"{form.kind}-{form.name}")
@settings(max_examples=12)
@given(seed=st.integers(0, 99), scale=st.sampled_from([1e-6, 0.1, 1.0, 20.0, 2000.0]))
def test_what_is_decoded_is_within_the_stated_error(form, seed, scale):
    true = values(seed, min(scale, 20.0) if form.kind == "logits" else scale)
    of_numpy = form.decode(form.encode(true, channels(np.ndarray)), channels(np.ndarray))
    assert all(s <= 1 for s in shares(form, true, of_numpy, channels(np.ndarray)).values())
    tensors = {name: torch.from_numpy(value) for name, value in true.items()}
    of_torch = form.decode(form.encode(tensors, channels(torch.Tensor)), channels(torch.Tensor))
    assert all(s <= 1 for s in shares(form, tensors, of_torch, channels(torch.Tensor)).values())


@pytest.mark.parametrize(
    "form",
    [f for f in EVERY_FORM if f.name != "below"],
    ids=lambda form: f"{form.kind}-{form.name}",
)
def test_values_of_another_row_are_beyond_it(form):
    true = values(0, 1.0)
    decoded = form.decode(form.encode(true, channels(np.ndarray)), channels(np.ndarray))
    turned = {name: np.roll(value, 1, axis=0) for name, value in decoded.items()}
    assert max(shares(form, true, turned, channels(np.ndarray)).values()) > 1
