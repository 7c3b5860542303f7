"""Forms work in blocks of rows; no stored byte depends on where a block ends."""

import numpy as np
import pytest
import torch

from pipeline.store.forms import form as module
from pipeline.store.forms import topk
from pipeline.store.forms.form import Channels, row_blocks
from pipeline.store.forms.int8 import Int8, quantise_rows
from pipeline.store.forms.topk import TopK, largest

RANDOM = np.random.default_rng(0)
ROWS = RANDOM.standard_normal((23, 3, 8)).astype(np.float32)
LOGITS = (RANDOM.standard_normal((11, 700)) * 3).astype(np.float32)


@pytest.fixture(params=[1, 100, 2**20], ids=lambda size: f"blocks of {size}")
def block_values(request, monkeypatch) -> int:
    monkeypatch.setattr(row_blocks, "__defaults__", (request.param,))
    monkeypatch.setattr(topk, "BLOCK_LOGITS", request.param)
    return request.param


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_quantised_rows_do_not_depend_on_blocks(block_values, library):
    levels, scale = quantise_rows(library(ROWS))
    largest_of_row = np.abs(ROWS).max(-1)
    step = (largest_of_row * np.float32((1 + 2.0**-10) / 127) + np.float32(2.0**-24)).astype("f2")
    np.testing.assert_array_equal(np.asarray(scale), step)
    plain = np.round(ROWS / step.astype(np.float32)[..., None]).astype(np.int8)
    np.testing.assert_array_equal(np.asarray(levels), plain, strict=True)


def test_standardised_rows_do_not_depend_on_blocks(block_values):
    flat = ROWS.reshape(23, 24)
    mean, deviation = flat.mean(0), flat.std(0)
    encoded = Int8().encode({"hidden": flat}, Channels(mean, deviation))
    levels, scale = quantise_rows((flat - mean) / deviation)
    np.testing.assert_array_equal(encoded["levels"], levels)
    np.testing.assert_array_equal(encoded["scale"], scale)


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_top_logits_do_not_depend_on_blocks(block_values, library, monkeypatch):
    form = TopK(k=5, temperatures=(2.0, 1.0, 0.5))
    found = form.encode({"logits": library(LOGITS)}, None)
    monkeypatch.setattr(topk, "BLOCK_LOGITS", 3 * 700)
    again = form.encode({"logits": library(LOGITS)}, None)
    for part, values in found.items():
        np.testing.assert_array_equal(np.asarray(values), np.asarray(again[part]), strict=True)


@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
@pytest.mark.parametrize("width", [50, 160, 700, 703, 4096])
def test_the_largest_entries_are_found_in_every_width(width, library):
    values = RANDOM.standard_normal((9, width)).astype(np.float32)
    values[0, -5:] += 9  # among the columns that no group has
    values[1, :80:16] += 9  # neighbours, at the distance of a group
    found, columns = largest(library(values), 5)
    expected = np.sort(np.argsort(-values, axis=-1)[:, :5], axis=-1)
    np.testing.assert_array_equal(np.asarray(columns), expected)
    np.testing.assert_array_equal(
        np.asarray(found), np.take_along_axis(values, expected, axis=-1), strict=True
    )


def test_of_no_rows_there_is_one_block():
    assert list(row_blocks(np.empty((0, 4)))) == [slice(0, 0)]
    assert TopK(k=2).encode({"logits": LOGITS[:0]}, None)["log_probs"].shape == (0, 2)
    assert quantise_rows(ROWS[:0])[0].shape == (0, 3, 8)
    assert module.BLOCK_VALUES > 1
