"""The stored bytes of each form, pinned: whoever changes them raises the form's version.

Stores written before must decode for ever, so a repaired quantiser is a new version, a new signal
name, and a new line here.
"""

import hashlib

import numpy as np
import pytest

from pipeline.store.forms.form import Channels
from pipeline.store.forms.registry import FORMS, build_form, identity

PINNED = {
    ("hidden", "float16", 1): ("float16-163ad3e6", "99e010b31f20ecbb"),
    ("hidden", "bfloat16", 1): ("bfloat16-826c60a8", "b534c1eef24d342a"),
    ("hidden", "int8", 1): ("int8-0f737721", "81689b961053f1c9"),
    ("hidden", "fp8", 1): ("fp8-5c49994c", "ee04fbdca919c43c"),
    ("hidden", "int4", 1): ("int4-78069f5f", "2b77dfe292265353"),
    ("attention", "qk", 1): ("qk-e8cfbc3a", "660c3c2bb5d91331"),
    ("attention", "map", 1): ("map-40bfd69d", "40611f6bb2e98231"),
    ("attention", "below", 1): ("below-b409c5fc", "e3b0c44298fc1c14"),
    ("value", "int8", 1): ("int8-0f737721", "84e5cf7b73dfabae"),
    ("logits", "head", 1): ("head-ea2e4295", "81689b961053f1c9"),
    ("logits", "dense", 1): ("dense-1dd854e1", "059f662eb13d2483"),
    ("logits", "topk", 2): ("topk-fbe2e401", "d66f62ec4acc7b9a"),
    ("logits", "sampled", 2): ("sampled-03e9debc", "2d221f7b83c6ab46"),
}
NORMALIZER = 3.75288
LOG_PROBS = -5237.35
SHAPES = {
    "hidden": (7, 8),
    "head_input": (7, 8),
    "query": (7, 4, 6),
    "key": (7, 2, 6),
    "value": (7, 2, 6),
    "logits": (7, 16),
}


def numbers(shape: tuple[int, ...]) -> np.ndarray:
    """Numbers of many sizes, exact in float32 and the same on every machine."""
    i = np.arange(np.prod(shape), dtype=np.int64)
    signed = (i * 2654435761 % 2**16 - 2**15).astype(np.float32)
    return (signed * np.float32(2.0) ** (i % 24 - 28).astype(np.float32)).reshape(shape)


def encoded(kind: str, name: str) -> dict[str, np.ndarray]:
    options = {"k": 4, "temperatures": [1.0, 2.0]} if name == "topk" else {}
    form = build_form(kind, name, options)
    channels = Channels(numbers((8,)), np.abs(numbers((8,))) + np.float32(0.25))
    values = {key: numbers(shape) for key, shape in SHAPES.items()}
    values["probability"] = np.abs(numbers((7, 4))) % 1
    if name == "sampled":
        # Of like size, so that all are drawn; the last bit of `exp` moves no point across a step.
        values["logits"] = (np.arange(7 * 16) * 7 % 5).reshape(7, 16).astype(np.float32)
    return form.encode(values, channels)


def digest(arrays: dict[str, np.ndarray]) -> str:
    found = hashlib.sha256()
    for key, value in sorted(arrays.items()):
        found.update(f"{key}:{value.dtype.str}:{value.shape};".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()[:16]


def test_every_form_is_pinned_in_its_version():
    forms = {(form.kind, form.name, form.version) for form in FORMS.values()}
    assert forms == set(PINNED), (
        "pin the bytes of the new version here, and keep the old golden store"
    )


@pytest.mark.parametrize(("kind", "name", "version"), PINNED)
def test_bytes_have_not_changed(kind, name, version):
    signal, expected = PINNED[kind, name, version]
    form = build_form(kind, name, {})
    assert form.version == version
    assert identity(form) == signal, "the name of every stored signal would change"
    arrays = encoded(kind, name)
    if name == "topk":
        # The last bit of `exp` and `log` is the library's: ids are pinned, values nearly.
        normalizer = arrays.pop("log_normalizer")
        log_probs = arrays.pop("log_probs")
        assert (log_probs.dtype, normalizer.dtype) == (np.float16, np.float32)
        np.testing.assert_allclose(normalizer.sum(), NORMALIZER, rtol=1e-5)
        np.testing.assert_allclose(log_probs.astype(np.float64).sum(), LOG_PROBS, rtol=1e-3)
    assert digest(arrays) == expected, f"{name}: raise its version and pin the new bytes"
