"""`decant copy`: where the copy goes, what it says at the end, and what a reader sees before."""

import shutil
from pathlib import Path

import pytest

from pipeline.store.index import withdraw
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from tests.cases import error_line


def store() -> Path:
    return next(Path("data/stores").iterdir())


def test_a_store_goes_to_another_disk_and_is_read_there(decant, project):
    name = store().name
    result = decant("copy", str(store()), "disk", "--signal", "hidden/2")
    assert result.exit_code == 0, result.output
    assert f"disk/{name}: copied 1 signal, " in result.stdout
    assert "; 0 files were already there" in result.stdout
    result = decant("copy", str(store()), f"disk/{name}")
    assert result.exit_code == 0, result.output
    assert f"disk/{name}: copied 4 signals, " in result.stdout
    assert "; 0 files were already there" not in result.stdout
    assert decant("inspect", f"disk/{name}").exit_code == 0
    # On another machine: the copy is all that the pipeline needs.
    shutil.rmtree("data/stores")
    shutil.move("disk", "data/stores")
    shutil.rmtree("data/teachers")
    assert decant("train", "aligned").exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--signal", "hidden/9"), 4, "signal hidden/9: not in the store, which has"),
        (("--signal", "hidden"), 2, "signal hidden: fits hidden/0/"),
    ],
)
def test_a_signal_that_is_none_is_named(decant, project, arguments, code, message):
    result = decant("copy", str(store()), "disk", *arguments)
    assert result.exit_code == code
    assert message in error_line(result)
    assert not Path("disk").exists()


def test_half_a_copy_is_refused_by_readers_and_a_damaged_source_is_named(decant, project):
    shard = next(
        path for path in store().glob("features.zarr/hidden/2/**/c/**/*") if path.is_file()
    )
    data = bytearray(shard.read_bytes())
    data[-9] ^= 4
    shard.write_bytes(data)
    result = decant("copy", str(store()), "disk")
    assert result.exit_code == 3
    assert str(shard) in error_line(result)
    half = decant("inspect", f"disk/{store().name}")
    assert half.exit_code == 3
    assert "no complete store is here" in error_line(half)
    verified = decant("verify", f"disk/{store().name}")
    assert verified.exit_code == 3
    assert "repeat the `decant copy` that was interrupted" in error_line(verified)
    data[-9] ^= 4
    shard.write_bytes(data)
    assert decant("copy", str(store()), "disk").exit_code == 0
    assert len(StoreReader(Path("disk") / store().name).signals) == 4


def test_several_stores_at_once(decant, project):
    whole, other = store(), Path("data/stores/other")
    shutil.copytree(whole, other)
    next(other.glob("features.zarr/hidden/2/*/*/c/0/0")).unlink()
    verified = decant("verify", str(other), str(whole))
    assert verified.exit_code == 3
    assert "store other" in verified.stdout
    assert f"store {whole.name}" in verified.stdout
    assert "other: 1 damaged file" in error_line(verified)
    shutil.copytree(whole, other, dirs_exist_ok=True)
    assert decant("copy", str(other), str(whole), "disk").exit_code == 0
    shown = decant("inspect", "disk/other", f"disk/{whole.name}")
    assert shown.stdout.count("\nsignal ") == 2


def test_a_store_without_a_whole_signal_is_not_copied(decant, project):
    for name in StoreReader(store()).signals:
        withdraw(Layout(store()), name)
    result = decant("copy", str(store()), "disk")
    assert result.exit_code == 4
    assert "none of its signals is complete yet" in error_line(result)
    assert not Path("disk").exists()
