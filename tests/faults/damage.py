"""Ways to damage a store, and what is read of it afterwards: plain functions, for fault tests."""

import json
import os
import struct
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.provenance import fingerprint
from pipeline.store.codec import decode_shard, encode_shard
from pipeline.store.forms.form import ArrayType
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.store.sealed import read_record, write_record
from pipeline.store.shards import bytes_digest
from tests.store.synthetic import SIGNALS, name_of, plan

HIDDEN = name_of("hidden", 1, "float16")
INT8 = name_of("hidden", 2, "int8")
QUERY_KEY = [name_of("attention", layer, "qk") for layer in (1, 2)]
EVERYTHING = tuple(SIGNALS)
REFUSED = (IntegrityError, IncompatibleError)
"""What reading a damaged or hostile store may end in: exit code 3 or 4, one line."""

MAX_ERROR = 1500

Damage = Callable[[Path], object]
Outcome = Literal["refused", "same", "wrong"]


def read_everything(store: Path, names: Sequence[str] = EVERYTHING) -> dict[str, bytes]:
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
        found[f"usable/{number}"] = segment.examples.tobytes() + segment.offset.tobytes()
    for key, column in reader.examples.items():
        found[f"examples/{key}"] = column.tobytes()
    for name in names:
        if (channels := reader.channels(name)) is not None:
            found[f"channels/{name}"] = channels.mean.tobytes() + channels.deviation.tobytes()
    found["asset"] = reader.asset("lm_head").read_bytes()
    found["config"] = json.dumps(reader.teacher_config()).encode()
    found["tokenizer"] = (reader.tokenizer() / "tokenizer.json").read_bytes()
    return found


@cache
def truth(whole_store: Path) -> dict[str, bytes]:
    """What is read of the undamaged store."""
    return read_everything(whole_store)


def outcome(store: Path, whole_store: Path, names: Sequence[str] = EVERYTHING) -> Outcome:
    """Read a damaged store; an exception that is not ours goes through."""
    try:
        found = read_everything(store, names)
    except REFUSED as refusal:
        error = str(refusal)
    else:
        error = ""
    if error:
        assert "\n" not in error
        assert len(error) < MAX_ERROR
        return "refused"
    expected = truth(whole_store)
    return "same" if all(expected[key] == value for key, value in found.items()) else "wrong"


def named(name: str) -> Callable[[Damage], Damage]:
    """Give a damage the name that the ledger and the test's id show."""

    def rename(damage: Damage) -> Damage:
        damage.__name__ = name
        return damage

    return rename


def shard(store: Path, name: str = HIDDEN, part: str = "values", segment: int = 0) -> Path:
    path = store / f"features.zarr/{name}/{part}/c/{segment}"
    while path.is_dir():
        path /= "0"
    return path


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def flip(path: Path, position: int, bit: int) -> None:
    """Turn one bit of a file around."""
    with path.open("r+b") as file:
        file.seek(position)
        [byte] = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def cut(path: Path, share: float) -> None:
    """Leave the first part of a file."""
    os.truncate(path, int(path.stat().st_size * share))


def change_index(path: Path, change: Callable[[Any], Any]) -> None:
    """Change a shard's own index of four chunks, and forge its checksum."""
    data = path.read_bytes()
    index = np.frombuffer(data[-68:-4], "<u8").reshape(4, 2).copy()
    table = change(index).tobytes()
    path.write_bytes(data[:-68] + table + struct.pack("<I", google_crc32c.value(table)))


def metadata(key: str, value: object) -> Damage:
    """Replace a key in an array's `zarr.json`."""

    @named(f"zarr.json: {key} {value}"[:60])
    def change(store: Path) -> None:
        path = store / f"features.zarr/{HIDDEN}/values/zarr.json"
        found = json.loads(path.read_text())
        path.write_text(json.dumps({**found, key: value}))

    return change


def lead_out(relative: str) -> Damage:
    """Put a link to an identical copy outside in the place of a file or directory."""

    @named(f"link out: {relative.replace(HIDDEN, 'SIGNAL')}")
    def change(store: Path) -> None:
        path = store / relative
        outside = store.parent / f"outside-{relative.replace('/', '-')}"
        path.rename(outside)
        path.symlink_to(outside)

    return change


def altered(relative: str) -> Damage:
    """Add a space, which no JSON would mind."""

    @named(f"a byte more: {relative}")
    def change(store: Path) -> None:
        path = store / relative
        path.write_bytes(path.read_bytes() + b" ")

    return change


def seal_again(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Forge a record: altered, with a good seal."""
    record = read_record(path, next(p for p in path.parents if Layout(p).plan.exists()))
    change(record)
    write_record(path, record)


def forge_index(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    seal_again(Layout(store).index, change)


def forge_plan(store: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Forge the plan and the index that pins it."""
    layout = Layout(store)
    seal_again(layout.plan, change)
    record = bytes_digest(layout.plan.read_bytes())
    forge_index(store, lambda index: index.update(plan=record))


def forge_manifest(
    store: Path, change: Callable[[dict[str, Any]], object], name: str = HIDDEN
) -> None:
    """Forge a signal's manifest with its digest, and the index that pins it."""
    layout = Layout(store)

    def change_all(manifest: dict[str, Any]) -> None:
        change(manifest)
        receipts = manifest["receipts"]
        segments = [[r["segment"], r["rows"], r["content"], r["skipped"]] for r in receipts]
        manifest["digest"] = fingerprint(
            {"declaration": manifest["declaration"], "segments": segments}
        )

    seal_again(layout.manifest(name), change_all)
    data = layout.manifest(name).read_bytes()
    entry = {"digest": json.loads(data)["digest"], "manifest": bytes_digest(data)}
    forge_index(store, lambda index: index["signals"].update({name: entry}))


def forge_shard(store: Path, data: bytes) -> None:
    """Put other bytes in the place of a shard, with every record that speaks of it."""
    path = shard(store)
    path.write_bytes(data)
    name = path.relative_to(store).as_posix()

    def change(manifest: dict[str, Any]) -> None:
        manifest["receipts"][0]["files"][name] = bytes_digest(data)

    forge_manifest(store, change)


def forge_column(store: Path, column: str, change: Callable[[Any], Any]) -> None:
    """Change a column of the example table, with every record that speaks of it."""
    name = f"features.zarr/examples/{column}/c/0"
    dtype = json.loads((store / f"features.zarr/examples/{column}/zarr.json").read_text())
    part, count = ArrayType(dtype["data_type"], ()), len(plan().row)
    values = decode_shard(
        (store / name).read_bytes(), part, shard_rows=count, chunk_rows=count, name=""
    )
    data = encode_shard(change(values.copy()).astype(values.dtype), count)
    (store / name).write_bytes(data)
    forge_plan(store, lambda plan: plan["files"].update({name: bytes_digest(data)}))


def forge_attachment(store: Path, relative: str, data: bytes) -> None:
    """Put other bytes in the place of a file that the plan lists, or a new one into the list."""
    path = store / "assets" / relative
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    forge_plan(store, lambda plan: plan["files"].update({f"assets/{relative}": bytes_digest(data)}))
