"""Eight-bit floats: the bytes of torch's e4m3, within the stated error, the same from numpy."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.store.codec import encode_shard
from pipeline.store.forms.form import Channels
from pipeline.store.forms.fp8 import VALUES, Float8, of_e4m3, to_e4m3
from pipeline.store.forms.int8 import Int8

WIDTH = 5
FEW = settings(max_examples=40, deadline=None)
ROWS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.just(WIDTH)),
    elements=st.floats(-1e4, 1e4, width=32),
)
EDGES = np.array(
    [
        *(0.0, -0.0, 448.0, -448.0, 440.0, 2**-6, 2**-7, 2**-9, 2**-10, 3 * 2**-10, 2**-11),
        *(1.0625, 1.1875, -1.0625, 15.5, 2**-6 - 2**-11, 1e-45, 3e-39),
    ],
    np.float32,
)


def statistics() -> Channels:
    """An ordinary, an outlier and a constant channel (deviation at its floor) among others."""
    mean = np.array([0.0, 1.0, 300.0, -2.0, 0.5], np.float32)
    return Channels(mean, np.array([1.0, 0.5, 50.0, 1e-6, 2.0], np.float32))


def as_torch(channels: Channels) -> Channels:
    return Channels(torch.from_numpy(channels.mean), torch.from_numpy(channels.deviation))


@FEW
@given(
    hnp.arrays(np.float32, 64, elements=st.floats(-448, 448, width=32))
    | hnp.arrays(np.float32, 64, elements=st.floats(-(2.0**-5), 2.0**-5, width=32))
    | st.just(EDGES)
)
def test_bytes_are_those_of_torch(values):
    expected = torch.from_numpy(values).to(torch.float8_e4m3fn)
    codes = to_e4m3(values)
    np.testing.assert_array_equal(codes, expected.view(torch.uint8).numpy(), strict=True)
    by_torch = to_e4m3(torch.from_numpy(values))
    np.testing.assert_array_equal(codes, by_torch.numpy(), strict=True)
    np.testing.assert_array_equal(of_e4m3(codes), expected.float().numpy(), strict=True)
    np.testing.assert_array_equal(of_e4m3(by_torch).numpy(), expected.float().numpy(), strict=True)


def test_the_table_has_the_value_of_every_byte():
    codes = torch.arange(256, dtype=torch.uint8)
    np.testing.assert_array_equal(VALUES, codes.view(torch.float8_e4m3fn).float().numpy())


@FEW
@given(ROWS | ROWS.map(lambda rows: rows * np.float32(1e-9)))
def test_it_errs_by_half_a_unit_in_the_last_place_of_each_value(hidden):
    form, channels = Float8(), statistics()
    standardised = np.abs((hidden.astype(np.float64) - channels.mean) / channels.deviation)
    # Beyond, the scale leaves float16, and the capture refuses the row.
    assume(standardised.max() < 2.9e7)
    encoded = form.encode({"hidden": hidden}, channels)
    by_torch = form.encode({"hidden": torch.from_numpy(hidden)}, as_torch(channels))
    for key, value in encoded.items():
        np.testing.assert_array_equal(value, by_torch[key].numpy(), strict=True)
    decoded = form.decode(encoded, channels)["hidden"]
    np.testing.assert_array_equal(
        decoded, form.decode(by_torch, as_torch(channels))["hidden"].numpy(), strict=True
    )
    largest = standardised.max(axis=-1, keepdims=True)
    bound = (0.0626 * standardised + 2.0**-18 * largest + 2.0**-33) * channels.deviation
    rounding = (np.abs(hidden) + np.abs(channels.mean)) * 2.0**-22
    assert (np.abs(decoded.astype(np.float64) - hidden) <= bound + rounding).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e38])
@pytest.mark.parametrize("library", [np.asarray, torch.from_numpy])
def test_a_row_beyond_the_scale_is_visibly_not_finite(value, library):
    hidden = np.ones((3, WIDTH), np.float32)
    hidden[1, 2] = value
    channels = statistics() if library is np.asarray else as_torch(statistics())
    scale = np.asarray(Float8().encode({"hidden": library(hidden)}, channels)["scale"])
    assert np.isfinite(scale).tolist() == [True, False, True]


def test_it_is_finer_than_int8_next_to_a_large_value_and_takes_fewer_bytes():
    random = np.random.default_rng(0)
    hidden = random.standard_normal((256, 64)).astype(np.float32)
    hidden[:, 0] = 200
    unit = Channels(np.zeros(64, np.float32), np.ones(64, np.float32))
    errors, sizes = [], []
    for form in (Int8(), Float8()):
        encoded = form.encode({"hidden": hidden}, unit)
        decoded = form.decode(encoded, unit)["hidden"]
        errors.append(np.linalg.norm((decoded - hidden)[:, 1:]) / np.linalg.norm(hidden[:, 1:]))
        sizes.append(sum(len(encode_shard(part, 256)) for part in encoded.values()))
    assert errors[1] < 0.03 < 0.3 < errors[0]
    encoded = Float8().encode({"hidden": random.standard_normal((256, 64), np.float32)}, unit)
    assert len(encode_shard(encoded["values_bits"], 256)) < 0.86 * 256 * 64
