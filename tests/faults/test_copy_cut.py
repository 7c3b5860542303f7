"""A copy that is killed anywhere is no store; the next run completes it and mends what is wrong."""

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.store.index import read_index
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.store.sealed import write_record
from pipeline.store.upkeep.copy import StoreCopy, copy_store
from pipeline.store.upkeep.gc import remove_signal
from tests.faults.forked import start
from tests.faults.ledger import Ledger
from tests.store.fixtures import without_sync
from tests.store.synthetic import Synthetic, name_of
from tests.store.test_copy import content

pytestmark = pytest.mark.usefixtures("unsynced")
NAMES = (name_of("hidden", 2, "int8"), name_of("logits", None, "head"))


class KilledError(BaseException):
    """Stands for a death of the process: nothing that the software catches."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of two signals, so that every rename of its copy can be the last one."""
    with without_sync():
        return Synthetic(tmp_path_factory.mktemp("source") / "small").run(NAMES)


def dying_at(number: int) -> tuple[Callable[..., None], list[int]]:
    """`os.replace` that ends the process at its n-th call: after odd ones, before even ones."""
    replace, count = os.replace, [0]

    def dying(*arguments: object) -> None:
        count[0] += 1
        if count[0] == number and number % 2 == 0:
            raise KilledError
        replace(*arguments)  # pyright: ignore[reportArgumentType]
        if count[0] == number:
            raise KilledError

    return dying, count


def is_readable(store: Path) -> bool:
    try:
        StoreReader(store)
    except IntegrityError as error:
        return "no complete store is here" not in str(error)
    return True


def test_a_copy_that_is_killed_is_no_store_and_is_completed(
    source, tmp_path, monkeypatch, ledger: Ledger, times
):
    replace = os.replace
    dying, count = dying_at(10**6)
    monkeypatch.setattr(os, "replace", dying)
    copy_store(source, tmp_path / "all")
    monkeypatch.setattr(os, "replace", replace)
    renames = count[0]
    chosen = np.linspace(1, renames, times(9, renames)).astype(int)
    for number in sorted(set(chosen.tolist())):
        target = tmp_path / str(number)
        monkeypatch.setattr(os, "replace", dying_at(number)[0])
        with pytest.raises(KilledError):
            copy_store(source, target)
        monkeypatch.setattr(os, "replace", replace)
        # After the last rename, that of the index, it is whole.
        early = is_readable(target / source.name) and not (number == renames and number % 2)
        done = StoreCopy(source, target)
        done.run()
        is_equal = content(done.root) == content(source)
        ledger.record("killed copy", detected=is_equal, wrong=early)
        assert not early
        assert is_equal
        assert done.kept > 0 or number < 3


def test_a_copy_that_adds_signals_and_is_killed_leaves_the_store_as_it_was(
    source, whole_store, tmp_path, monkeypatch, ledger: Ledger, times
):
    replace, number = os.replace, 0
    for number in range(1, 400, times(61, 3)):
        target = tmp_path / str(number)
        copy = copy_store(whole_store, target, signals=NAMES)
        before = read_index(Layout(copy))
        monkeypatch.setattr(os, "replace", dying_at(number)[0])
        try:
            copy_store(whole_store, target)
        except KilledError:
            pass
        else:
            break
        finally:
            monkeypatch.setattr(os, "replace", replace)
        kept = read_index(Layout(copy)) == before
        reader = StoreReader(copy)
        for segment in range(len(reader.plan["segments"])):
            reader.read_segment(segment, NAMES)
        copy_store(whole_store, target)
        is_equal = content(copy) == content(whole_store)
        ledger.record("killed copy of more signals", detected=is_equal, lost=not kept)
        assert kept
        assert is_equal
    assert number > 100


def slow_copy(source: Path, target: Path) -> None:
    """Copy with a pause after every file, long enough to be killed in."""
    copy_store(source, target, progress=lambda _: signal.sigtimedwait([], 0.01))


def test_a_copy_under_sigkill_is_completed_by_the_same_command(
    whole_store, tmp_path, ledger: Ledger, times
):
    generator = np.random.default_rng(0)
    for number in range(times(1, 40)):
        target = tmp_path / str(number)
        child = start(slow_copy, whole_store, target, stderr=tmp_path / "errors")
        wanted = int(generator.integers(1, 60))
        while child.is_running() and len(list(target.rglob("c/*"))) < wanted:
            pass
        code = child.kill()
        early = is_readable(target / whole_store.name) and code == -signal.SIGKILL
        done = StoreCopy(whole_store, target)
        done.run()
        is_equal = content(done.root) == content(whole_store)
        ledger.record("killed copy", detected=is_equal, wrong=early)
        assert code == -signal.SIGKILL, child.errors()
        assert not early
        assert is_equal
        assert done.kept > 0


def name_outside(store: Path, canary: Path) -> str:
    """Let the index, well sealed, name an asset that is no file of the store."""
    index = read_index(Layout(store))
    index["assets"]["lm_head"]["file"] = f"../../{canary.name}"
    write_record(Layout(store).index, index)
    return "lm_head"


def link_outside(store: Path, canary: Path) -> str:
    """Let a directory of the store lead out of it."""
    layers = Layout(store).features / "logits"
    layers.rename(canary.parent / "logits")
    layers.symlink_to(canary.parent / "logits")
    return NAMES[1]


def name_root(store: Path, canary: Path) -> str:
    return str(canary)


def name_above(store: Path, canary: Path) -> str:
    return f"../../{canary.name}"


@pytest.mark.parametrize("hostile", [name_outside, link_outside, name_root, name_above])
def test_nothing_outside_a_hostile_store_is_copied_or_removed(
    hostile, source, tmp_path, ledger: Ledger
):
    store = shutil.copytree(source, tmp_path / "stores" / "hostile")
    canary = tmp_path / "canary"
    canary.write_text("alive")
    name = hostile(store, canary)
    outside = {p for p in tmp_path.rglob("*") if not p.is_relative_to(store)}
    with pytest.raises((IntegrityError, IncompatibleError)) as caught:
        remove_signal(store, name)
    with pytest.raises((IntegrityError, IncompatibleError)):
        copy_store(store, tmp_path / "disk", signals=NAMES if name in NAMES else [NAMES[1], name])
    touched = outside - set(tmp_path.rglob("*")) or canary.read_text() != "alive"
    ledger.record("hostile: path out, copied and removed", wrong=bool(touched))
    assert not touched
    assert re.search("canary|leads out|inside (the|a) store", str(caught.value))


def flip(path: Path, generator: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    data[int(generator.integers(len(data)))] ^= 1 << int(generator.integers(8))
    path.write_bytes(data)


def test_flips_at_the_other_end_are_mended(source, whole_store, tmp_path, ledger: Ledger, times):
    """A bit in each of many files of a kind at once."""
    generator = np.random.default_rng(1)
    original = (source, whole_store)[times(0, 1)]
    copy = copy_store(original, tmp_path)
    kinds = ("c/**/*", "zarr.json", "channels/*", "lm_head*", "teacher/*", "declaration.json")
    kinds += ("0*.json", "plan.json", "hidden*.json", "receipts/assets/*", "manifest.json")
    for kind in kinds:
        paths = [path for path in sorted(copy.rglob(kind)) if path.is_file()]
        assert paths, kind
        for path in paths[:: times(4, 1)]:
            flip(path, generator)
        copy_store(original, tmp_path)
        is_equal = content(copy) == content(original)
        ledger.record("flipped bit: copy between two runs", detected=is_equal, wrong=not is_equal)
        assert is_equal, kind


def test_a_flip_at_the_source_is_found_and_named(
    source, whole_store, tmp_path, ledger: Ledger, times
):
    generator = np.random.default_rng(2)
    store = shutil.copytree((source, whole_store)[times(0, 1)], tmp_path / "original" / "store")
    index = Layout(store).index
    # Receipts and declarations are made anew from the manifests, which hold all they say.
    paths = [p for p in sorted(store.rglob("*")) if p.is_file() and "receipts" not in p.parts]
    chosen = [path for path in paths if path.name != "lock"]
    for number, path in enumerate(chosen[:: times(3, 1)]):
        whole = path.read_bytes()
        flip(path, generator)
        with pytest.raises(IntegrityError) as caught:
            copy_store(store, tmp_path / str(number))
        path.write_bytes(whole)
        is_named = str(path) in str(caught.value) or path == index
        early = is_readable(tmp_path / str(number) / store.name)
        ledger.record("flipped bit: source of a copy", detected=is_named, wrong=early)
        assert is_named, caught.value
        assert not early
    assert content(copy_store(store, tmp_path / "last")) == content(store)
