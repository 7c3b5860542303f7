"""Four bits a value: within the stated half step, in any width, the same from numpy and torch."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.errors import ConfigError
from pipeline.store.codec import encode_shard
from pipeline.store.forms.form import ArrayType, Channels, Geometry
from pipeline.store.forms.int4 import Int4
from pipeline.store.forms.int8 import Int8
from pipeline.store.forms.registry import build_form

FINITE = st.floats(-1e4, 1e4, width=32)
ROWS = st.integers(1, 40).flatmap(
    lambda width: hnp.arrays(
        np.float32, st.tuples(st.integers(1, 4), st.just(width)), elements=FINITE
    )
)
FEW = settings(max_examples=40, deadline=None)


def statistics(width: int) -> Channels:
    """Ordinary, outlier and nearly constant channels in turn."""
    index = np.arange(width)
    mean = np.array([0.0, 300.0, -2.0], np.float32)[index % 3]
    return Channels(mean, np.array([1.0, 50.0, 0.05, 2.0], np.float32)[index % 4])


def as_torch(channels: Channels) -> Channels:
    return Channels(torch.from_numpy(channels.mean), torch.from_numpy(channels.deviation))


@FEW
@given(ROWS, st.sampled_from([16, 32]))
def test_it_errs_by_half_a_step_of_the_group(hidden, group):
    form, channels = Int4(group), statistics(hidden.shape[1])
    standardised = (hidden.astype(np.float64) - channels.mean) / channels.deviation
    encoded = form.encode({"hidden": hidden}, channels)
    by_torch = form.encode({"hidden": torch.from_numpy(hidden)}, as_torch(channels))
    for key, value in encoded.items():
        np.testing.assert_array_equal(value, by_torch[key].numpy(), strict=True)
    decoded = form.decode(encoded, channels)["hidden"]
    np.testing.assert_array_equal(
        decoded, form.decode(by_torch, as_torch(channels))["hidden"].numpy(), strict=True
    )
    for first in range(0, hidden.shape[1], group):
        here = slice(first, first + group)
        largest = np.abs(standardised[:, here]).max(axis=-1, keepdims=True)
        bound = (0.501 * largest / 8 + 2.0**-24) * channels.deviation[here]
        rounding = (np.abs(hidden[:, here]) + np.abs(channels.mean[here])) * 2.0**-22
        error = np.abs(decoded[:, here].astype(np.float64) - hidden[:, here])
        assert (error <= bound + rounding).all()
    error = form.errors({"hidden": hidden}, {"hidden": decoded}, channels)["hidden"]
    assert (error.found <= error.stated).all()


@pytest.mark.parametrize(
    ("width", "group", "levels", "scales"),
    [(384, 64, 192, 6), (384, 128, 192, 3), (100, 64, 64, 2), (5, 64, 3, 1), (1, 16, 1, 1)],
)
def test_two_levels_share_a_byte(width, group, levels, scales):
    form = Int4(group)
    parts = form.arrays(Geometry(width=width))
    assert parts == {
        "levels": ArrayType("uint8", (levels,)),
        "scale": ArrayType("float16", (scales,)),
    }
    hidden = np.random.default_rng(0).standard_normal((3, width)).astype(np.float32)
    for rows in (hidden, hidden[:0]):
        encoded = form.encode({"hidden": rows}, statistics(width))
        found = {
            key: ArrayType(str(value.dtype), value.shape[1:]) for key, value in encoded.items()
        }
        assert found == parts
        assert form.decode(encoded, statistics(width))["hidden"].shape == rows.shape


def test_it_takes_half_of_int8_and_an_eleventh_of_its_size_is_lost():
    """Normal values, as channels nearly are once they are standardised."""
    hidden = np.random.default_rng(0).standard_normal((1024, 256)).astype(np.float32)
    plain = Channels(np.zeros(256, np.float32), np.ones(256, np.float32))

    def stored(form: Int4 | Int8) -> int:
        return sum(
            len(encode_shard(x, 256)) for x in form.encode({"hidden": hidden}, plain).values()
        )

    assert stored(Int4()) < 0.55 * stored(Int8())
    decoded = Int4().decode(Int4().encode({"hidden": hidden}, plain), plain)["hidden"]
    assert np.linalg.norm(decoded - hidden) < 0.1 * np.linalg.norm(hidden)


def test_an_outlier_costs_its_group_alone():
    hidden = np.random.default_rng(0).standard_normal((1, 64)).astype(np.float32)
    plain = Channels(np.zeros(64, np.float32), np.ones(64, np.float32))
    spoilt = hidden.copy()
    spoilt[0, 3] = 1e3
    before, after = (
        Int4(32).decode(Int4(32).encode({"hidden": rows}, plain), plain)["hidden"]
        for rows in (hidden, spoilt)
    )
    np.testing.assert_array_equal(before[:, 32:], after[:, 32:])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
def test_a_row_that_is_not_finite_has_a_scale_that_is_not(bad):
    hidden = np.ones((3, 40), np.float32)
    hidden[1, 39] = bad
    scale = Int4(16).encode({"hidden": hidden}, statistics(40))["scale"]
    assert np.isfinite(scale).all(axis=-1).tolist() == [True, False, True]


def test_other_groups_are_refused():
    with pytest.raises(ConfigError, match=r"hidden.group: found 7, expected 16, 32"):
        build_form("hidden", "int4", {"group": 7})
