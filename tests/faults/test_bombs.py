"""A store whose bytes would burst, or lead a decoder astray: refused in bounded memory."""

import json
import resource
import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from numcodecs import blosc, zstd  # pyright: ignore[reportAttributeAccessIssue]
from safetensors.numpy import save

from pipeline.errors import IntegrityError
from pipeline.store.codec import CRC, INDEX_ENTRY, decode_shard, encode_shard
from pipeline.store.forms.form import ArrayType
from pipeline.store.shards import bytes_digest
from tests.faults.damage import (
    INT8,
    REFUSED,
    Damage,
    forge_attachment,
    forge_manifest,
    forge_plan,
    forge_shard,
    named,
    read_everything,
)
from tests.faults.forked import start
from tests.faults.hostile import CHANNELS, FILES, HUGE, MOST_MEMORY, SECRET, declared, special
from tests.store.synthetic import WIDTH


def chunk_of(values: bytes, *, claims: int | None = None) -> bytes:
    """A Blosc chunk in which zstd is at its best; it may claim another size."""
    chunk = bytearray(blosc.compress(values, b"zstd", 9, blosc.NOSHUFFLE, 0, 1))
    if claims is not None:
        chunk[4:8] = struct.pack("<I", claims)
    return bytes(chunk)


def shard_of(*chunks: bytes) -> bytes:
    """A shard of any chunks, with its index and all checksums."""
    whole = [chunk + CRC.pack(google_crc32c.value(chunk)) for chunk in chunks]
    index = np.zeros(len(whole), INDEX_ENTRY)
    index["bytes"] = [len(chunk) for chunk in whole]
    index["offset"] = np.cumsum(index["bytes"]) - index["bytes"]
    footer = index.tobytes()
    return b"".join([*whole, footer, CRC.pack(google_crc32c.value(footer))])


CHUNK_BYTES = 4 * WIDTH * 2
GOOD = chunk_of(bytes(CHUNK_BYTES))
BOMB_BYTES = 2**27


def bomb(name: str, make: Any) -> Damage:
    return named(f"bomb: {name}")(lambda store: forge_shard(store, shard_of(make(), *[GOOD] * 3)))


def frame() -> bytes:
    """One zstd frame, 28,660-fold and more, that says how large it is, and nothing of Blosc."""
    found = zstd.compress(bytes(BOMB_BYTES), 19)
    assert BOMB_BYTES / len(found) > 28_660
    return found


def frame_in_blosc() -> bytes:
    """A chunk that claims what it should, with one block of 128 MiB in it."""
    inner = zstd.compress(bytes(BOMB_BYTES), 19)
    head = struct.pack("<BBBBIII", 2, 1, 4 << 5, 1, CHUNK_BYTES, CHUNK_BYTES, 24 + len(inner))
    return head + struct.pack("<II", 20, len(inner)) + inner


def lying_safetensors(header: dict[str, Any] | bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + bytes(8 * WIDTH)


def of_statistics(name: str, data: bytes) -> Damage:
    """Statistics with every record that speaks of them."""

    @named(f"safetensors: {name}")
    def forge(store: Path) -> None:
        (store / CHANNELS).write_bytes(data)
        forge_manifest(store, declared(channels=bytes_digest(data)), INT8)

    return forge


def tensor(**changes: Any) -> dict[str, Any]:
    entry = {"dtype": "F32", "shape": [WIDTH], "data_offsets": [0, 4 * WIDTH], **changes}
    second = {"dtype": "F32", "shape": [WIDTH], "data_offsets": [4 * WIDTH, 8 * WIDTH]}
    return {"mean": entry, "deviation": second}


ONES = np.ones(WIDTH, np.float32)
LARGE = [
    bomb("claims its 128 MiB", lambda: chunk_of(bytes(BOMB_BYTES))),
    bomb("claims what it should", lambda: chunk_of(bytes(BOMB_BYTES), claims=CHUNK_BYTES)),
    bomb("claims nothing", lambda: chunk_of(bytes(BOMB_BYTES), claims=0)),
    bomb("claims 4 GiB", lambda: chunk_of(bytes(BOMB_BYTES), claims=2**32 - 1)),
    bomb("a plain zstd frame", frame),
    bomb("one block in a small chunk", frame_in_blosc),
    of_statistics("header of 2^63 bytes", lying_safetensors(b"{}", 2**63)),
    of_statistics("header of 2^30 bytes", lying_safetensors(b"{}", 2**30)),
    of_statistics("nested header", lying_safetensors(b"[" * 60_000)),
    of_statistics("shape of 2^40", lying_safetensors(tensor(shape=[HUGE]))),
    of_statistics("data beyond the end", lying_safetensors(tensor(data_offsets=[0, HUGE]))),
    of_statistics("unknown dtype", lying_safetensors(tensor(dtype="OBJECT"))),
    of_statistics("other width", save({"mean": ONES[:2], "deviation": ONES[:2]})),
    of_statistics("other dtype", save({"mean": ONES.astype("f8"), "deviation": ONES.astype("f8")})),
    of_statistics("other names", save({"m": ONES, "deviation": ONES})),
    of_statistics("deviation of 0", save({"mean": ONES, "deviation": ONES * 0})),
    of_statistics("not a number", save({"mean": ONES * np.nan, "deviation": ONES})),
    *(special(name, "json") for name in FILES[3:8]),
    named("json: plan of a million files")(
        lambda store: forge_plan(
            store, lambda p: p["files"].update({f"assets/{n:030}": SECRET for n in range(40_000)})
        )
    ),
    named("json: nested configuration")(
        lambda store: forge_attachment(store, "teacher/config.json", b"[" * 5_000_000)
    ),
    named("json: configuration a list")(
        lambda store: forge_attachment(store, "teacher/config.json", b"[1]")
    ),
]


def read_measured(store: Path, result: Path) -> None:
    """Read a store, and note how it ended and how far memory grew; in a process of its own."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    error = None
    try:
        read_everything(store)
    except REFUSED as refusal:
        error = str(refusal)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    result.write_text(json.dumps({"error": error, "grown_bytes": grown * 1024}))


@pytest.mark.parametrize("damage", LARGE, ids=lambda damage: damage.__name__)
def test_what_would_burst_is_refused_in_bounded_memory(store, tmp_path, ledger, damage):
    damage(store)
    result = tmp_path / "result.json"
    child = start(read_measured, store, result, stderr=tmp_path / "stderr")
    code = child.wait(60)
    found = json.loads(result.read_text()) if code == 0 else {}
    is_refused = bool(found.get("error")) and found["grown_bytes"] < MOST_MEMORY
    ledger.record(f"hostile: {damage.__name__.split(':')[0]}", detected=is_refused)
    assert code == 0, child.errors()
    assert found["error"]
    assert "\n" not in found["error"]
    assert found["grown_bytes"] < MOST_MEMORY, found


def decode_lies(count: int, result: Path) -> None:
    """Decode chunks whose Blosc header or body is not what it was, checksums forged."""
    random = np.random.default_rng(0)
    values = random.integers(0, 50, (8, 6)).astype("f2")
    good = encode_shard(values, 4)
    refused = 0
    for _ in range(count):
        data = bytearray(good)
        where = int(random.integers(16 if random.random() < 0.7 else len(good) - 40))
        data[where] = int(random.integers(256))
        try:
            shape = {"shard_rows": 8, "chunk_rows": 4, "name": "shard"}
            decoded = decode_shard(bytes(data), ArrayType("float16", (6,)), **shape)
            assert decoded.shape == (8, 6)
        except IntegrityError:
            refused += 1
    result.write_text(str(refused))


def test_a_chunk_that_lies_never_overruns(tmp_path, ledger, times):
    """A forger can write any value; he cannot make the decoder read or write beyond its buffers.

    A process of its own, for an overrun would end it.
    """
    result, count = tmp_path / "refused", times(3000, 100_000)
    child = start(decode_lies, count, result, stderr=tmp_path / "stderr")
    code = child.wait(120)
    ledger.record("hostile: lying Blosc header", detected=code == 0)
    assert code == 0, child.errors()
    assert int(result.read_text()) > count // 3
