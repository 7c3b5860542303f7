"""A copy of a store is the same files; it is added to what fits, and nothing else is touched."""

import os
import shutil
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, IncompatibleError, IntegrityError, ResourceError
from pipeline.provenance import fingerprint
from pipeline.store.index import index_signal, read_index, withdraw
from pipeline.store.layout import Layout
from pipeline.store.lock import writer_lock
from pipeline.store.reader import StoreReader
from pipeline.store.sealed import read_record, write_record
from pipeline.store.upkeep.contents import find_signal
from pipeline.store.upkeep.copy import StoreCopy, copy_store
from tests.store.synthetic import SIGNALS, name_of

HIDDEN, BELOW = name_of("hidden", 2, "int8"), name_of("attention", 3, "below")
HEAD = name_of("logits", None, "head")

pytestmark = pytest.mark.usefixtures("unsynced")


def content(store: Path) -> dict[str, bytes]:
    """Every file but the lock."""
    return {
        str(path.relative_to(store)): path.read_bytes()
        for path in sorted(store.rglob("*"))
        if path.is_file() and path.name != "lock"
    }


def read_all(store: Path) -> StoreReader:
    reader = StoreReader(store)
    for number in range(len(reader.plan["segments"])):
        reader.read_segment(number, reader.signals)
    return reader


def test_a_copy_has_the_same_files_and_a_second_run_writes_none(whole_store, tmp_path):
    first = StoreCopy(whole_store, tmp_path / "disk")
    told = []
    assert first.run(told.append) == tmp_path / "disk" / whole_store.name
    assert content(first.root) == content(whole_store)
    assert sum(told) == first.bytes == first.copied_bytes
    assert first.kept == 0
    assert read_all(first.root).signals == sorted(SIGNALS)
    times = {path: path.stat().st_mtime_ns for path in first.root.rglob("*.*")}
    again = StoreCopy(whole_store, tmp_path / "disk")
    again.run()
    assert again.copied_bytes == 0
    assert again.kept == len(told)
    assert {path: path.stat().st_mtime_ns for path in first.root.rglob("*.*")} == times


def test_a_path_that_ends_in_the_name_is_the_copy_itself(whole_store, tmp_path):
    place = tmp_path / "disk" / whole_store.name
    assert copy_store(whole_store, place) == place
    assert StoreReader(place).signals
    # There already: still the copy itself, and no store inside a store.
    assert copy_store(whole_store, place) == place
    assert not (place / whole_store.name).exists()


def test_a_signal_brings_what_it_is_rebuilt_from_and_nothing_else(whole_store, tmp_path):
    copy = copy_store(whole_store, tmp_path, signals=["hidden/2"])
    found = content(copy)
    assert read_all(copy).signals == [HIDDEN]
    assert [name for name in found if name.startswith("assets/channels")] == [
        "assets/channels/hidden.2.safetensors"
    ]
    assert "assets/lm_head.safetensors" not in found
    assert not any("hidden/1" in name or "logits" in name for name in found)
    assert (
        found.items() <= (content(whole_store) | {"manifest.json": found["manifest.json"]}).items()
    )
    # More signals are added to those that are there.
    assert read_all(copy_store(whole_store, tmp_path, signals=[HEAD])).signals == sorted(
        [HIDDEN, HEAD]
    )
    assert StoreReader(copy).asset("lm_head").is_file()
    assert read_all(copy_store(whole_store, tmp_path)).signals == sorted(SIGNALS)
    assert content(copy) == content(whole_store)


def test_attention_that_is_rebuilt_brings_the_hidden_states_below(store, tmp_path):
    layout = Layout(store)
    path = layout.manifest(BELOW)
    manifest = read_record(path, store)
    manifest["declaration"]["info"]["hidden"] = 2
    declaration = fingerprint(manifest["declaration"])
    for receipt in manifest["receipts"]:
        receipt["declaration"] = declaration
    segments = [[r["segment"], r["rows"], r["content"], r["skipped"]] for r in manifest["receipts"]]
    manifest["digest"] = fingerprint({"declaration": manifest["declaration"], "segments": segments})
    withdraw(layout, BELOW)
    write_record(path, manifest)
    index_signal(layout, BELOW, manifest["digest"])
    copy = copy_store(store, tmp_path / "disk", signals=[BELOW])
    assert StoreReader(copy).signals == sorted([BELOW, HIDDEN])


def test_a_beginning_means_one_signal():
    names = sorted(SIGNALS)
    assert find_signal(names, "hidden/2") == HIDDEN
    assert find_signal(names, HIDDEN) == HIDDEN
    assert find_signal(["hidden/2/a-1", "hidden/20/a-1"], "hidden/2") == "hidden/2/a-1"
    with pytest.raises(ConfigError, match=r"signal hidden/1: fits .*bfloat16.*float16"):
        find_signal(names, "hidden/1")
    with pytest.raises(IncompatibleError, match="signal hidden/7: not in the store, which has"):
        find_signal(names, "hidden/7")


def test_what_the_source_does_not_list_is_not_copied(store, tmp_path):
    withdraw(Layout(store), HIDDEN)
    copy = copy_store(store, tmp_path / "disk")
    assert HIDDEN not in StoreReader(copy).signals
    assert not (copy / "features.zarr" / HIDDEN).exists()


def test_a_signal_that_was_captured_equal_at_both_ends_is_one(store, whole_store, tmp_path):
    """Equal values in other bytes (another software wrote them): readers never see a mixture."""
    copy = copy_store(whole_store, tmp_path / "disk", signals=[HIDDEN])
    layout = Layout(copy)
    path = layout.manifest(HIDDEN)
    record = read_record(path, copy)
    write_record(path, record | {"software": {"torch": "other"}})
    index_signal(layout, HIDDEN, record["digest"])
    copy_store(whole_store, tmp_path / "disk", signals=[HIDDEN])
    assert read_index(layout)["signals"] == {
        HIDDEN: read_index(Layout(whole_store))["signals"][HIDDEN]
    }
    assert read_all(copy).signals == [HIDDEN]


def altered_plan(copy: Path, whole: Path) -> None:
    layout = Layout(copy)
    write_record(layout.plan, read_record(layout.plan, copy) | {"max_length": 9})


def other_digest(copy: Path, whole: Path) -> None:
    index_signal(Layout(copy), HIDDEN, "0" * 64)


def other_asset(copy: Path, whole: Path) -> None:
    index = read_index(Layout(copy))
    index["assets"]["lm_head"]["xxh3"] = 5
    write_record(Layout(copy).index, index)


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (altered_plan, r"has the plan of .* examples .*, expected that of .* examples"),
        (other_digest, rf"{HIDDEN} has digest 0{{16}} there, [0-9a-f]{{16}} in "),
        (other_asset, r"has another asset lm_head \(0000000000000005\), expected [0-9a-f]{16}"),
    ],
)
def test_what_is_another_store_is_not_added_to(whole_store, tmp_path, alter, message):
    copy = copy_store(whole_store, tmp_path / "disk")
    alter(copy, whole_store)
    before = content(copy)
    with pytest.raises(IncompatibleError, match=message):
        copy_store(whole_store, tmp_path / "disk")
    assert content(copy) == before


def test_a_target_that_is_no_place_for_a_copy_is_refused(whole_store, tmp_path):
    shutil.copytree(whole_store, tmp_path / "renamed")
    with pytest.raises(IncompatibleError, match="renamed: is a store, expected a directory of"):
        copy_store(whole_store, tmp_path / "renamed")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="file: is a file; expected a directory of stores"):
        copy_store(whole_store, tmp_path / "file")
    for place in (whole_store, whole_store.parent, whole_store / "assets"):
        with pytest.raises(ConfigError, match=r"is the store .* or in it"):
            copy_store(whole_store, place)
    with pytest.raises(IntegrityError, match="no complete store is here"):
        copy_store(tmp_path, tmp_path / "disk")


def test_a_disk_without_room_is_said_before_the_first_byte(whole_store, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1234))
    with pytest.raises(ResourceError, match=r"needs 16,\d\d\d,\d\d\d bytes, 1,234 are free"):
        copy_store(whole_store, tmp_path / "disk")
    assert not list((tmp_path / "disk").rglob("*.zarr"))


@pytest.mark.parametrize("name", ["features.zarr", "receipts", "manifests", "staging"])
def test_a_directory_that_leads_out_of_the_copy_is_not_written_to(name, whole_store, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    place = tmp_path / "disk" / whole_store.name
    place.mkdir(parents=True)
    (place / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match=rf"{name}: a link to .*, expected none inside a st"):
        copy_store(whole_store, tmp_path / "disk")
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_disk_that_reads_back_otherwise_is_not_trusted(whole_store, tmp_path, monkeypatch):
    """Stands for a disk: what it drops of its pages comes back with a bit flipped."""

    def dropped(descriptor: int, *_: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").resolve()
        if path.name == "tokenizer.json":
            path.write_bytes(b"{}\r")

    monkeypatch.setattr(os, "posix_fadvise", dropped)
    with pytest.raises(IntegrityError, match=r"tokenizer\.json: reads back otherwise"):
        copy_store(whole_store, tmp_path)
    assert not (tmp_path / whole_store.name / "assets/tokenizer/tokenizer.json").exists()
    assert not Layout(tmp_path / whole_store.name).index.exists()


def test_two_copies_to_one_place_wait_for_each_other(whole_store, tmp_path, caplog):
    from threading import Thread

    copies = [Thread(target=copy_store, args=(whole_store, tmp_path)) for _ in range(2)]
    with writer_lock(tmp_path / whole_store.name / "lock"):
        for copy in copies:
            copy.start()
        while caplog.text.count("waiting for process") < 2:
            copies[0].join(0.01)
        assert not (tmp_path / whole_store.name / "features.zarr").exists()
    for copy in copies:
        copy.join()
    assert content(tmp_path / whole_store.name) == content(whole_store)
