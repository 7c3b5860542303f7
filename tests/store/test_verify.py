"""Verifying names what is damaged and nothing else; repairing lets capture redo just that."""

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ConfigError, IncompatibleError, IntegrityError
from pipeline.provenance import fingerprint
from pipeline.store.codec import encode_shard
from pipeline.store.commit import content_digest
from pipeline.store.index import withdraw
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.store.sealed import read_record, write_record
from pipeline.store.shards import bytes_digest
from pipeline.store.upkeep.findings import ASSETS, INDEX, PLAN
from pipeline.store.upkeep.gc import remove_store
from pipeline.store.upkeep.repair import repair
from pipeline.store.upkeep.verify import damage_of, unrecorded_files, verify_store
from tests.captured import DAMAGES
from tests.faults.damage import forge_column
from tests.store.fixtures import without_sync
from tests.store.synthetic import Synthetic, name_of

INT8 = name_of("hidden", 2, "int8")
FLOAT16 = name_of("hidden", 1, "float16")
BELOW = name_of("attention", 3, "below")
NAMES = (INT8, FLOAT16, BELOW)

FILES = {
    "shard": f"features.zarr/{INT8}/levels/c/1/0",
    "receipt": f"receipts/{INT8.replace('/', '.')}/000001.json",
    "receipt without shards": f"receipts/{BELOW.replace('/', '.')}/000000.json",
    "declaration": f"receipts/{INT8.replace('/', '.')}/declaration.json",
    "manifest": f"manifests/{INT8.replace('/', '.')}.json",
    "index": "manifest.json",
    "plan": "manifests/plan.json",
    "tokens": "features.zarr/tokens/input_ids/c/1",
    "examples": "features.zarr/examples/label/c/0",
    "array": f"features.zarr/{INT8}/levels/zarr.json",
    "group": "features.zarr/hidden/zarr.json",
    "group of all": "features.zarr/zarr.json",
    "tokenizer": "assets/tokenizer/tokenizer.json",
    "teacher": "assets/teacher/config.json",
    "statistics": "assets/channels/hidden.2.safetensors",
    "asset": "assets/lm_head.safetensors",
    "record of the asset": "receipts/assets/lm_head.json",
}


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    with without_sync():
        return Synthetic(tmp_path_factory.mktemp("small") / "store").run(NAMES)


@pytest.fixture
def copied(small, tmp_path, unsynced) -> Path:
    return shutil.copytree(small, tmp_path / "store")


def states(store: Path, *, deep: bool = False) -> dict[str, str]:
    return {state.name: state.state for state in verify_store(store, deep=deep)}


def named(store: Path, *, deep: bool = False) -> list[str]:
    return [damage.file for damage in damage_of(verify_store(store, deep=deep))]


def digests(store: Path) -> dict[str, str]:
    return {name: entry["digest"] for name, entry in StoreReader(store).index["signals"].items()}


def test_a_whole_store_is_whole_and_every_file_of_it_is_stated(small):
    counted: list[int] = []
    found = verify_store(small, deep=True, progress=counted.append)
    assert {state.name: state.state for state in found} == dict.fromkeys(
        (INDEX, PLAN, ASSETS, *NAMES), "whole"
    )
    assert unrecorded_files(small, found) == []
    reader = StoreReader(small)
    assert {s.name: s.bytes for s in found if s.name in NAMES} == {
        name: reader.signal(name).bytes for name in NAMES
    }
    assert sum(counted) >= sum(state.bytes for state in found if state.name != ASSETS)
    int8 = next(state for state in found if state.name == INT8)
    assert (int8.form, int8.segments, int8.whole) == ("int8", 4, 4)


@pytest.mark.parametrize("kind", FILES)
def test_what_readers_see_after_a_repair_is_whole(kind, copied):
    DAMAGES["flipped byte"](copied / FILES[kind])
    repair(copied, verify_store(copied))
    # Rows, tokenizer and plan can only be written by who has the corpus.
    if kind in ("tokens", "examples"):
        assert states(copied)[PLAN] == "damaged: 1 file"
    elif kind in ("plan", "tokenizer", "teacher"):
        assert named(copied) == ["manifest.json", "manifests/plan.json"]
    else:
        assert not named(copied)


def test_the_state_counts_segments(copied):
    for segment in (0, 2):
        DAMAGES["flipped byte"](copied / f"features.zarr/{INT8}/scale/c/{segment}")
    assert states(copied)[INT8] == "damaged: 2 of 4 segments"
    assert states(copied)[FLOAT16] == "whole"
    repair(copied, verify_store(copied))
    assert states(copied)[INT8] == "pending: 2 of 4"
    assert StoreReader(copied).signals == sorted({FLOAT16, BELOW})


def test_records_that_others_tell_are_written_again_without_a_capture(copied):
    expected = digests(copied)
    for kind in ("receipt", "declaration", "array", "group", "index", "record of the asset"):
        (copied / FILES[kind]).unlink()
    assert sorted(named(copied)) == sorted(
        FILES[kind] for kind in ("receipt", "declaration", "array", "group", "index")
    )
    repair(copied, verify_store(copied))
    assert digests(copied) == expected
    assert set(states(copied, deep=True).values()) == {"whole"}


def test_what_is_not_indexed_is_pending_however_it_looks(copied):
    withdraw(Layout(copied), INT8)
    assert states(copied)[INT8] == "pending: 4 of 4"
    DAMAGES["short"](copied / FILES["shard"])
    DAMAGES["missing"](copied / FILES["receipt"].replace("1.json", "2.json"))
    assert states(copied)[INT8] == "pending: 2 of 4"
    DAMAGES["flipped byte"](copied / FILES["declaration"])
    assert states(copied)[INT8] == "pending"
    assert not named(copied)


def test_a_capture_that_was_stopped_is_no_damage(tmp_path, unsynced):
    stopped = Synthetic(tmp_path / "store")
    stopped.layout.lock.parent.mkdir()
    stopped.layout.lock.touch()
    assert set(states(tmp_path / "store").values()) == {"pending", "whole"}
    stopped.plan()
    stopped.layout.index.unlink()
    assert not named(tmp_path / "store")


def test_files_of_no_record_are_counted_and_no_damage(copied):
    for name in ("staging/1/some.shard", f"features.zarr/{INT8}/levels/c/9/0"):
        (copied / name).parent.mkdir(parents=True)
        (copied / name).write_bytes(b"left over")
    found = verify_store(copied)
    assert not damage_of(found)
    assert unrecorded_files(copied, found) == [
        f"features.zarr/{INT8}/levels/c/9/0",
        "staging/1/some.shard",
    ]


def test_a_file_beside_the_tokenizer_is_damage(copied):
    before = {path: path.stat().st_mtime_ns for path in copied.rglob("*.json")}
    (copied / "assets/tokenizer/added_tokens.json").write_text("{}")
    assert named(copied) == ["assets/tokenizer/added_tokens.json"]
    # No capture is needed: nothing but that file is touched.
    repair(copied, verify_store(copied))
    assert not named(copied)
    assert {path: path.stat().st_mtime_ns for path in copied.rglob("*.json")} == before


def test_a_file_beside_the_tokenizer_is_not_taken_into_the_plan(copied):
    plan = (copied / FILES["plan"]).read_bytes()
    (copied / "assets/tokenizer/added_tokens.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"added_tokens\.json: not a file of the tokenizer"):
        Synthetic(copied).plan()
    assert (copied / FILES["plan"]).read_bytes() == plan


def test_links_are_removed_and_not_what_they_lead_to(copied, tmp_path):
    for name in (f"features.zarr/{INT8}/levels", "assets/lm_head.safetensors"):
        outside = tmp_path / name.replace("/", "-")
        (copied / name).rename(outside)
        (copied / name).symlink_to(outside)
    found = verify_store(copied)
    assert {state.name for state in found if state.is_damaged} == {INT8, ASSETS}
    repair(copied, found)
    assert not (copied / f"features.zarr/{INT8}/levels").is_symlink()
    assert len(list(tmp_path.glob("features*/c/*/0"))) == 4
    Synthetic(copied).run(NAMES)
    assert set(states(copied).values()) == {"whole"}


@pytest.mark.parametrize("name", ["staging", "manifests", "receipts", "assets/tokenizer"])
def test_nothing_is_written_or_removed_through_a_link(name, copied, tmp_path):
    (copied / name).mkdir(exist_ok=True)
    DAMAGES["flipped byte"](copied / FILES["shard"])
    (copied / name).rename(tmp_path / "outside")
    (copied / name).symlink_to(tmp_path / "outside")
    outside = {path: path.read_bytes() for path in (tmp_path / "outside").rglob("*.json")}
    repair(copied, verify_store(copied))
    assert not (copied / name).is_symlink()
    assert {path: path.read_bytes() for path in (tmp_path / "outside").rglob("*.json")} == outside


@pytest.mark.parametrize("name", ["receipts", "manifests", "assets", f"features.zarr/{INT8}"])
def test_a_file_in_the_place_of_a_directory_is_removed(name, copied):
    shutil.rmtree(copied / name)
    (copied / name).write_text("")
    assert named(copied)
    repair(copied, verify_store(copied))
    Synthetic(copied).run(NAMES)
    assert set(states(copied).values()) == {"whole"}


def test_directories_nested_deep_are_one_error(copied):
    """A thousand would be more than Python's own walks can take."""
    copied.joinpath("staging", *["d"] * 50).mkdir(parents=True)
    with pytest.raises(IntegrityError, match="nested 51 directories deep, expected at most 50"):
        unrecorded_files(copied, verify_store(copied))
    with pytest.raises(IntegrityError, match="nested 51 directories deep"):
        remove_store(copied)


def test_a_metadata_file_of_a_terabyte_is_not_read(copied):
    os.truncate(copied / FILES["array"], 2**40)
    found = verify_store(copied)
    assert [d.reason for d in damage_of(found)] == [
        "found 1099511627776 bytes, expected at most 1234"
    ]
    repair(copied, found)
    assert not named(copied)


def test_lengths_of_no_plan_are_damage_and_no_size(copied):
    """Every checksum is right: who forges a plan must not choose how much memory we take."""
    forge_column(copied, "segment", lambda column: np.where(column == column.max(), 2**30, column))
    (damage,) = damage_of(verify_store(copied))
    assert damage.file == "manifests/plan.json"
    assert damage.reason.startswith(f"{copied}/features.zarr/examples/segment: 1073741824 for")
    repair(copied, verify_store(copied))
    Synthetic(copied).run(NAMES)
    assert set(states(copied, deep=True).values()) == {"whole"}


@pytest.mark.parametrize("kinds", [("shard", "statistics"), ("receipt", "manifest")])
def test_a_directory_in_the_place_of_a_file_is_removed(kinds, copied):
    for kind in kinds:
        (copied / FILES[kind]).unlink()
        (copied / FILES[kind]).mkdir()
    assert sorted(named(copied)) == sorted(FILES[kind] for kind in kinds)
    repair(copied, verify_store(copied))
    Synthetic(copied).run(NAMES)
    assert set(states(copied).values()) == {"whole"}


def forge(
    store: Path, change: Callable[[np.ndarray], None], *, skipped: tuple[int, ...] = ()
) -> None:
    """Write other values of a segment and every record so that they agree; the content stays."""
    layout = Layout(store)
    reader = StoreReader(store)
    stored = reader.signal(FLOAT16)
    parts = reader.read_segment(0, [FLOAT16]).features[FLOAT16]
    change(parts["values"])
    data = encode_shard(parts["values"], 4)
    name = f"features.zarr/{FLOAT16}/values/c/0/0"
    (store / name).write_bytes(data)
    path = layout.manifest(FLOAT16)
    manifest = read_record(path, store)
    receipt = manifest["receipts"][0]
    receipt["files"][name] = bytes_digest(data)
    live = int(reader.examples["length"][reader.examples_in(0)].sum())
    if change is not slip:
        receipt["content"] = content_digest(parts, live)
    receipt["skipped"] = list(skipped)
    rows = [[r["segment"], r["rows"], r["content"], r["skipped"]] for r in manifest["receipts"]]
    manifest["digest"] = fingerprint(
        {"declaration": stored.declaration.to_json(), "segments": rows}
    )
    write_record(path, manifest)
    write_record(layout.receipt(FLOAT16, 0), receipt)
    index = read_record(layout.index, store)
    index["signals"][FLOAT16] = {
        "digest": manifest["digest"],
        "manifest": bytes_digest(path.read_bytes()),
    }
    write_record(layout.index, index)


def slip(values: np.ndarray) -> None:
    values[1, 1] += 1


def spoil(values: np.ndarray) -> None:
    values[0, 1] = np.inf


@pytest.mark.parametrize(
    ("change", "skipped", "reason"),
    [
        (slip, (), "content digest [0-9a-f]{16}, expected [0-9a-f]{16}"),
        (spoil, (), r"values that are not finite in slots \[0\], which are not listed as skipped"),
        (spoil, (0,), r"values in rows of the skipped slots \[0\]"),
        (lambda values: None, (99,), r"skipped slots \[99\], of [0-9] that it has"),
    ],
)
def test_deep_sees_what_checksums_do_not(change, skipped, reason, copied):
    """Every digest of bytes agrees: what wrote them was wrong."""
    forge(copied, change, skipped=skipped)
    assert not named(copied)
    found = verify_store(copied, deep=True)
    (damage,) = damage_of(found)
    assert damage.segment == 0
    assert damage.file == f"features.zarr/{FLOAT16}/values/c/0/0"
    assert re.fullmatch(reason, damage.reason)
    repair(copied, found)
    Synthetic(copied).run(NAMES)
    assert set(states(copied, deep=True).values()) == {"whole"}


def test_rows_that_are_not_those_of_their_identities_spoil_the_plan(copied):
    layout = Layout(copied)
    name = "features.zarr/tokens/input_ids/c/1"
    reader = StoreReader(copied)
    ids = reader.read_segment(1).tokens["input_ids"].copy()
    ids[0] += 1
    data = encode_shard(ids, 4)
    (copied / name).write_bytes(data)
    plan = read_record(layout.plan, copied)
    plan["files"][name] = bytes_digest(data)
    write_record(layout.plan, plan)
    index = read_record(layout.index, copied)
    index["plan"] = bytes_digest(layout.plan.read_bytes())
    write_record(layout.index, index)
    assert not named(copied)
    found = verify_store(copied, deep=True)
    assert [(d.file, d.segment) for d in damage_of(found)] == [("manifests/plan.json", 1)]
    repair(copied, found)
    Synthetic(copied).run(NAMES)
    assert set(states(copied, deep=True).values()) == {"whole"}


def test_what_is_no_store_is_said(tmp_path):
    with pytest.raises(ConfigError, match="not a store; expected a directory below data/stores"):
        verify_store(tmp_path)


def test_another_format_is_incompatible(copied):
    path = Layout(copied).index
    write_record(path, {**read_record(path, copied), "format": 99})
    with pytest.raises(IncompatibleError, match="store format 99, this software reads 1"):
        verify_store(copied)
