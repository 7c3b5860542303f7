"""Axes of the Zarr arrays are named for what they are; stores without the names stay good."""

import json
import shutil
from pathlib import Path

import pytest
import zarr

from pipeline.store.index import read_index
from pipeline.store.layout import Layout
from pipeline.store.upkeep.copy import copy_store
from pipeline.store.upkeep.verify import damage_of, verify_store
from tests.store.synthetic import SIGNALS, Synthetic, name_of

NAMES = {
    "tokens/input_ids": ("token",),
    "examples/label": ("example",),
    "examples/digest": ("example", "byte"),
    f"{name_of('hidden', 1, 'bfloat16')}/values_bits": ("token", "channel"),
    f"{name_of('hidden', 2, 'int8')}/scale": ("token",),
    f"{name_of('hidden', 3, 'int4')}/levels": ("token", "channel_pair"),
    f"{name_of('hidden', 3, 'int4')}/scale": ("token", "group"),
    f"{name_of('attention', 1, 'qk')}/query": ("token", "head", "channel"),
    f"{name_of('attention', 1, 'qk')}/key_scale": ("token", "kv_head"),
    f"{name_of('attention', 2, 'map')}/levels": ("pair", "head"),
    f"{name_of('value', 1, 'int8')}/value": ("token", "kv_head", "channel"),
    f"{name_of('logits', None, 'topk')}/id_gaps": ("token", "id"),
    f"{name_of('logits', None, 'topk')}/log_normalizer": ("token", "temperature"),
    f"{name_of('logits', None, 'dense')}/logits": ("example", "output"),
}


def arrays(store: Path) -> dict[str, zarr.Array]:
    members = zarr.open_group(store / "features.zarr", mode="r").members(max_depth=None)
    return {name: node for name, node in members if isinstance(node, zarr.Array)}


def dimensions(store: Path) -> dict[str, tuple[str | None, ...]]:
    return {name: array.metadata.dimension_names or () for name, array in arrays(store).items()}  # pyright: ignore[reportAttributeAccessIssue]


def without_names(store: Path) -> None:
    """Leave a store as the first release wrote it."""
    for path in (store / "features.zarr").rglob("zarr.json"):
        metadata = json.loads(path.read_text())
        if "shape" in metadata:
            axes = range(1, len(metadata["shape"]))
            metadata["dimension_names"] = ["row", *(f"axis_{i}" for i in axes)]
            path.write_text(json.dumps(metadata, indent=2) + "\n")


def test_each_axis_is_named_and_has_one_size_in_its_group(whole_store):
    """So `xarray.open_datatree` opens it: a name of two sizes in a group is its error."""
    assert NAMES.items() <= dimensions(whole_store).items()
    sizes: dict[tuple[str, str], set[int]] = {}
    for name, array in arrays(whole_store).items():
        names = dimensions(whole_store)[name]
        assert len(set(names)) == array.ndim
        for axis, size in zip(names, array.shape, strict=True):
            sizes.setdefault((name.rpartition("/")[0], str(axis)), set()).add(size)
    assert all(len(found) == 1 for found in sizes.values()), sizes


@pytest.mark.usefixtures("unsynced")
def test_a_store_without_the_names_is_extended_verified_and_copied(tmp_path, whole_store):
    first = tuple(SIGNALS)[:2]
    old = Synthetic(tmp_path / "old").run(first)
    without_names(old)
    before = dimensions(old)
    Synthetic(old).run()
    assert before.items() <= dimensions(old).items()
    found, expected = (read_index(Layout(one))["signals"] for one in (old, whole_store))
    assert {name: one["digest"] for name, one in found.items()} == {
        name: one["digest"] for name, one in expected.items()
    }
    assert damage_of(verify_store(old, deep=True)) == []
    assert dimensions(copy_store(old, tmp_path / "disk")) == dimensions(whole_store)


@pytest.mark.usefixtures("unsynced")
def test_other_names_are_still_damage(tmp_path, whole_store):
    store = shutil.copytree(whole_store, tmp_path / "store")
    path = store / "features.zarr/tokens/input_ids/zarr.json"
    path.write_text(path.read_text().replace('"token"', '"tokex"'))
    (damage,) = damage_of(verify_store(store))
    assert damage.file == "features.zarr/tokens/input_ids/zarr.json"
