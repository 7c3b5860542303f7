"""One file of a store is damaged: verify names it and no other, and capture redoes just that."""

import itertools
import shutil
from pathlib import Path

import pytest

from pipeline.store.reader import StoreReader
from pipeline.store.upkeep.repair import repair
from pipeline.store.upkeep.verify import damage_of, verify_store
from tests.captured import DAMAGES
from tests.store.fixtures import without_sync
from tests.store.synthetic import Synthetic, name_of

INT8 = name_of("hidden", 2, "int8")
NAMES = (INT8, name_of("attention", 1, "qk"), name_of("attention", 3, "below"))
RECEIPTS = "receipts/*/0*.json"
KINDS = {
    "shard": "features.zarr/*/*/*/*/c/**/*",
    "tokens": "features.zarr/tokens/*/c/*",
    "examples": "features.zarr/examples/*/c/**/*",
    "zarr.json": "features.zarr/**/zarr.json",
    "receipt": RECEIPTS,
    "declaration": "receipts/*/declaration.json",
    "asset's record": "receipts/assets/*",
    "manifest": "manifests/[!p]*",
    "plan": "manifests/plan.json",
    "index": "manifest.json",
    "tokenizer": "assets/tokenizer/*",
    "teacher's configuration": "assets/teacher/*",
    "statistics": "assets/channels/*",
    "asset": "assets/*.safetensors",
}
"""Every kind of file, and where in a store those of it are."""


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    with without_sync():
        return Synthetic(tmp_path_factory.mktemp("small") / "store").run(NAMES)


def files_of(store: Path) -> list[tuple[str, str]]:
    """Return kind and name of every file, the lock left out."""
    return [
        (kind, path.relative_to(store).as_posix())
        for kind, pattern in KINDS.items()
        for path in sorted(store.glob(pattern))
        if path.is_file()
    ]


def test_every_file_is_of_one_kind(small):
    names = [name for _, name in files_of(small)]
    every = (p.relative_to(small).as_posix() for p in small.rglob("*") if p.is_file())
    assert sorted(names) == sorted(name for name in every if name != "lock")


@pytest.mark.usefixtures("unsynced")
def test_verify_names_it_and_capture_redoes_just_that(small, tmp_path, ledger, times):
    every = files_of(small)
    few = list(zip(dict(every).items(), itertools.cycle(DAMAGES)))
    many = list(itertools.product(every, DAMAGES))
    digests = StoreReader(small).index["signals"]
    for (kind, name), damage in times(few, many):
        store = shutil.copytree(small, tmp_path / "store")
        DAMAGES[damage](store / name)
        found = verify_store(store)
        is_named = [one.file for one in damage_of(found)] == [name]
        repair(store, found)
        kept = {path: path.stat().st_mtime_ns for path in store.glob(RECEIPTS)}
        redone = len(list(small.glob(RECEIPTS))) - len(kept)
        Synthetic(store).run(NAMES)
        is_complete = {state.state for state in verify_store(store, deep=True)} == {"whole"}
        is_equal = StoreReader(store).index["signals"] == digests
        is_kept = {path: path.stat().st_mtime_ns for path in kept} == kept
        ledger.record(
            f"repaired: {kind}",
            detected=is_named and is_complete,
            wrong=not is_equal,
            lost=not is_kept,
        )
        said = f"{damage}: {name}"
        assert is_named, (said, damage_of(found))
        assert is_complete, said
        assert is_equal, said
        assert is_kept, said
        assert redone == (kind == "shard"), said
        shutil.rmtree(store)
