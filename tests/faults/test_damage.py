"""Every kind of damage to a store raises; no wrong value is ever read, and nobody waits."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest

from pipeline.errors import DecantError, IncompatibleError, IntegrityError
from pipeline.provenance import fingerprint
from pipeline.store.codec import decode_shard, encode_shard
from pipeline.store.commit import trusted_receipt
from pipeline.store.forms.form import Part
from pipeline.store.layout import Layout
from pipeline.store.planner import write_plan
from pipeline.store.reader import StoreReader
from pipeline.store.sealed import read_record, write_record
from pipeline.store.shards import bytes_digest
from tests.store.synthetic import SIGNALS, Synthetic, name_of, plan, rows

HIDDEN = name_of("hidden", 1, "float16")
INT8 = name_of("hidden", 2, "int8")
QUERY_KEY = [name_of("attention", layer, "qk") for layer in (1, 2)]
EVERYTHING = list(SIGNALS)


def read_everything(store: Path, names: list[str] = EVERYTHING) -> dict[str, bytes]:
    """All that a student could use of a store, as bytes."""
    reader = StoreReader(store)
    found = {}
    for number in range(len(reader.plan["segments"])):
        segment = reader.read_segment(number, names)
        for name, parts in segment.features.items():
            for part, array in parts.items():
                found[f"{name}/{part}/{number}"] = array.tobytes()
        for column, array in segment.tokens.items():
            found[f"{column}/{number}"] = array.tobytes()
    for key, column in reader.examples.items():
        found[f"examples/{key}"] = column.tobytes()
    for name in names:
        if (channels := reader.channels(name)) is not None:
            found[f"channels/{name}"] = channels.mean.tobytes() + channels.deviation.tobytes()
    found["asset"] = reader.asset("lm_head").read_bytes()
    found["config"] = json.dumps(reader.teacher_config()).encode()
    found["tokenizer"] = (reader.tokenizer() / "tokenizer.json").read_bytes()
    return found


@pytest.fixture(scope="session")
def truth(whole_store) -> dict[str, bytes]:
    return read_everything(whole_store)


def shard(store: Path, name: str = HIDDEN, part: str = "values", segment: int = 0) -> Path:
    return store / f"features.zarr/{name}/{part}/c/{segment}/0"


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def swap_segments(store: Path) -> None:
    """Both are intact shards: every chunk checksum passes, and their crc32c is the same."""
    one, other = (shard(store, segment=segment).read_bytes() for segment in (0, 1))
    assert google_crc32c.value(one) == google_crc32c.value(other)
    swap(shard(store, segment=0), shard(store, segment=1))


def swap_layers(store: Path) -> None:
    one, other = (store / f"features.zarr/{name}/query/c/0/0" for name in QUERY_KEY)
    swap(one / "0" if one.is_dir() else one, other / "0" if other.is_dir() else other)


def swap_chunks(store: Path) -> None:
    """The index of a shard, forged with its checksum: two of its chunks change places."""
    change_index(store, lambda index: index[[1, 0, 2, 3]])


def lose_chunk(store: Path) -> None:
    """As Zarr marks a chunk that is not there, which its readers take for zeros."""

    def change(index):
        index[1] = 2**64 - 1
        return index

    change_index(store, change)


def change_index(store: Path, change: Callable) -> None:
    path = shard(store)
    data = path.read_bytes()
    index = np.frombuffer(data[-68:-4], "<u8").reshape(4, 2).copy()
    table = change(index).tobytes()
    path.write_bytes(data[:-68] + table + struct.pack("<I", google_crc32c.value(table)))


def claim_a_gigabyte(store: Path) -> None:
    path = shard(store)
    data = path.read_bytes()
    path.write_bytes(data[:4] + struct.pack("<I", 2**30) + data[8:])


def huge_sparse_file(store: Path) -> None:
    """Its size must be looked at before it is read."""
    os.truncate(shard(store), 2**40)


def pipe(store: Path) -> None:
    """Opening it for reading would wait for a writer for ever."""
    shard(store).unlink()
    os.mkfifo(shard(store))


def metadata(key: str, value: object) -> Callable[[Path], None]:
    def change(store: Path) -> None:
        path = store / f"features.zarr/{HIDDEN}/values/zarr.json"
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, key: value}))

    change.__name__ = f"metadata_{key}"
    return change


def lead_out(relative: str) -> Callable[[Path], None]:
    """A link to an identical copy outside the store."""

    def change(store: Path) -> None:
        path = store / relative
        outside = store.parent / "outside"
        path.rename(outside)
        path.symlink_to(outside)

    change.__name__ = f"link_{relative.replace('/', '_')}"
    return change


def seal_again(path: Path, change: Callable[[dict], object]) -> None:
    """A forged record: altered, with a good seal."""
    record = read_record(path, path.parents[len(path.parents) - 1])
    change(record)
    write_record(path, record)


def forge_plan(store: Path) -> None:
    seal_again(Layout(store).plan, lambda plan: plan.update(pad_id=7))


def forge_manifest(store: Path) -> None:
    seal_again(Layout(store).manifest(HIDDEN), lambda m: m["receipts"].reverse())


def forge_digest_in_index(store: Path) -> None:
    seal_again(Layout(store).index, lambda index: index["signals"][HIDDEN].update(digest="0" * 64))


def swap_manifests(store: Path) -> None:
    """Both whole, and the index with them: query and key of one layer for another's."""

    def change(index: dict) -> None:
        signals = index["signals"]
        one, other = QUERY_KEY
        signals[one], signals[other] = signals[other], signals[one]

    one, other = (Layout(store).manifest(name) for name in QUERY_KEY)
    swap(one, other)
    seal_again(Layout(store).index, change)


def features_of_other_rows(store: Path) -> None:
    """A manifest whose receipts say that a segment holds other examples; all digests agree."""
    layout = Layout(store)

    def change_manifest(manifest: dict) -> None:
        receipts = manifest["receipts"]
        receipts[0]["rows"] = receipts[1]["rows"]
        segments = [[r["segment"], r["rows"], r["content"], r["skipped"]] for r in receipts]
        manifest["digest"] = fingerprint(
            {"declaration": manifest["declaration"], "segments": segments}
        )

    seal_again(layout.manifest(HIDDEN), change_manifest)
    data = layout.manifest(HIDDEN).read_bytes()
    entry = {
        "digest": json.loads(data)["digest"],
        "manifest": bytes_digest(data),
    }
    seal_again(layout.index, lambda index: index["signals"].update({HIDDEN: entry}))


def drop_a_receipt_from_the_manifest(store: Path) -> None:
    layout = Layout(store)
    seal_again(layout.manifest(HIDDEN), lambda manifest: manifest["receipts"].pop())
    data = layout.manifest(HIDDEN).read_bytes()
    record = bytes_digest(data)
    seal_again(layout.index, lambda index: index["signals"][HIDDEN].update(manifest=record))


def statistics_of_another_layer(store: Path) -> None:
    layout = Layout(store)
    target = layout.channels("hidden", 2)
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(bytes(data))


def asset_leads_elsewhere(store: Path) -> None:
    (store.parent / "secret").write_bytes(b"outside")
    entry = {"file": "../../secret", **bytes_digest(b"outside")}
    seal_again(Layout(store).index, lambda index: index["assets"].update(lm_head=entry))


def altered(relative: str) -> Callable[[Path], None]:
    def change(store: Path) -> None:
        path = store / relative
        path.write_bytes(path.read_bytes() + b" ")

    change.__name__ = f"altered_{relative.replace('/', '_')}"
    return change


def cut(relative: str) -> Callable[[Path], None]:
    def change(store: Path) -> None:
        os.truncate(store / relative, 100)

    change.__name__ = f"cut_{relative.replace('/', '_')}"
    return change


def examples_of_another_order(store: Path) -> None:
    """Labels joined to other rows: column and plan agree, the row digests do not."""
    layout = Layout(store)
    name = "features.zarr/examples/label/c/0"
    count = len(plan().row)
    values = decode_shard(
        (store / name).read_bytes(), Part("int64", ()), shard_rows=count, chunk_rows=count, name=""
    )
    data = encode_shard(np.roll(values, 1), count)
    (store / name).write_bytes(data)
    record = bytes_digest(data)
    seal_again(layout.plan, lambda plan: plan["files"].update({name: record}))
    plan_data = layout.plan.read_bytes()
    record = bytes_digest(plan_data)
    seal_again(layout.index, lambda index: index.update(plan=record))


DAMAGE: list[Callable[[Path], object]] = [
    lambda store: shard(store).unlink(),
    lambda store: os.truncate(shard(store), 0),
    lambda store: os.truncate(shard(store), 40),
    lambda store: shutil.rmtree(store / f"features.zarr/{HIDDEN}/values/c/1"),
    lambda store: shutil.rmtree(store / f"features.zarr/{HIDDEN}"),
    lambda store: (store / "features.zarr/tokens/input_ids/c/0").unlink(),
    lambda store: Layout(store).manifest(HIDDEN).unlink(),
    lambda store: Layout(store).plan.unlink(),
    lambda store: Layout(store).index.unlink(),
    swap_segments,
    swap_layers,
    swap_chunks,
    lose_chunk,
    claim_a_gigabyte,
    huge_sparse_file,
    pipe,
    metadata("shape", [2**40, 6]),
    metadata("data_type", "object"),
    metadata("codecs", [{"name": "bytes"}]),
    metadata("fill_value", 1.0),
    lead_out(f"features.zarr/{HIDDEN}/values/c/0/0"),
    lead_out(f"features.zarr/{HIDDEN}/values/c/0"),
    lead_out(f"features.zarr/{HIDDEN}/values"),
    lead_out(f"features.zarr/{HIDDEN}"),
    lead_out("features.zarr"),
    lead_out("manifest.json"),
    lead_out("manifests"),
    lead_out("assets/lm_head.safetensors"),
    lead_out("assets/teacher"),
    forge_plan,
    forge_manifest,
    forge_digest_in_index,
    swap_manifests,
    features_of_other_rows,
    drop_a_receipt_from_the_manifest,
    statistics_of_another_layer,
    asset_leads_elsewhere,
    examples_of_another_order,
    altered("assets/lm_head.safetensors"),
    altered("assets/teacher/config.json"),
    altered("assets/tokenizer/tokenizer.json"),
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda d: f"{d.__name__}{DAMAGE.index(d)}")
def test_damage_is_never_read(store, damage):
    damage(store)
    with pytest.raises((IntegrityError, IncompatibleError)):
        read_everything(store)


def test_whole_is_read(store, truth):
    assert read_everything(store) == truth


@pytest.mark.parametrize(
    "relative",
    [
        f"features.zarr/{INT8}/levels/c/0/0",
        f"features.zarr/{INT8}/scale/c/1",
        "features.zarr/tokens/input_ids/c/0",
        "features.zarr/examples/start/c/0",
        "assets/channels/hidden.2.safetensors",
        "manifest.json",
        "manifests/plan.json",
    ],
)
def test_no_flipped_byte_gives_a_wrong_value(store, truth, relative):
    """Every seventh byte at the least; what still reads must read the truth (a space in JSON)."""
    path = store / relative
    data = path.read_bytes()
    harmless = 0
    for position in range(0, len(data), max(1, len(data) // 60)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        path.write_bytes(flipped)
        try:
            found = read_everything(store, [INT8])
        except DecantError:
            continue
        harmless += 1
        assert all(truth[key] == value for key, value in found.items())
    assert harmless == 0 or relative == "manifest.json"


@pytest.mark.parametrize(
    ("forge", "match"),
    [
        (features_of_other_rows, "features of other rows .* expected"),
        (examples_of_another_order, "is not the row that was planned"),
        (drop_a_receipt_from_the_manifest, "not the manifest of the whole signal"),
        (swap_segments, "found checksum|found [0-9]+ bytes"),
        (huge_sparse_file, "found 1099511627776 bytes, expected"),
        (pipe, "expected a regular file"),
        (lead_out("features.zarr"), "expected a regular file inside the store"),
    ],
)
def test_the_error_says_what_is_wrong(store, forge, match):
    forge(store)
    with pytest.raises(IntegrityError, match=match):
        read_everything(store)


def test_another_format_is_incompatible(store):
    seal_again(Layout(store).index, lambda index: index.update(format=99))
    with pytest.raises(IncompatibleError, match="store format 99, this software reads 1"):
        StoreReader(store)


@pytest.mark.parametrize("change", [{"form": "int9"}, {"form_version": 99}, {"options": {"x": 1}}])
def test_a_form_of_another_software_is_incompatible(store, change):
    declared = StoreReader(store).signal(HIDDEN).declaration
    with pytest.raises(IncompatibleError, match="use the software that wrote"):
        replace(declared, **change).build_form()


@pytest.mark.parametrize(
    "damage",
    [
        altered("manifests/plan.json"),
        cut("manifests/plan.json"),
        cut("manifest.json"),
        lambda store: Layout(store).index.unlink(),
    ],
)
@pytest.mark.usefixtures("unsynced")
def test_capture_mends_records_without_losing_a_shard(store, truth, damage):
    """Index and plan are rebuilt from manifests and rows; no feature is computed again."""
    digest = StoreReader(store).signal(HIDDEN).digest
    damage(store)
    Synthetic(store).plan()
    assert StoreReader(store).signal(HIDDEN).digest == digest
    assert read_everything(store) == truth


@pytest.mark.usefixtures("unsynced")
def test_a_plan_of_other_rows_is_refused(store):
    forge_plan(store)
    with pytest.raises(IntegrityError, match="the plan of another corpus or other options"):
        Synthetic(store).plan()


@pytest.mark.usefixtures("unsynced")
def test_capture_mends_tokens_and_metadata(store, truth):
    (store / "features.zarr/tokens/input_ids/c/0").unlink()
    os.truncate(store / "features.zarr/examples/label/c/0", 3)
    metadata("shape", [1, 6])(store)
    Synthetic(store).plan()
    assert Synthetic(store).writer(HIDDEN).missing() == []
    assert read_everything(store) == truth


@pytest.mark.usefixtures("unsynced")
def test_a_damaged_tokenizer_is_named(store):
    path = store / "assets/tokenizer/tokenizer.json"
    path.write_text("{ }")
    plan_record = StoreReader(store).plan
    keys = ("spec", "chunk_tokens", "task", "classes", "vocab", "pad_id", "max_length")
    with pytest.raises(IntegrityError, match=r"tokenizer\.json: missing or altered"):
        write_plan(Layout(store), plan(), rows(), {key: plan_record[key] for key in keys})


def test_no_receipt_is_trusted_whose_files_lead_out(store):
    lead_out(f"features.zarr/{HIDDEN}/values/c/0")(store)
    assert trusted_receipt(Layout(store), HIDDEN, 0, verify=False) is None
