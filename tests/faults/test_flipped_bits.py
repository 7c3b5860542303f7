"""One bit of any file of a store turns around: somebody who reads that file says so, always."""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import IntegrityError
from pipeline.store.codec import BLOSC_HEADER, CRC, INDEX_ENTRY
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.store.upkeep.verify import verify_store
from tests.faults.damage import HIDDEN, INT8, flip, outcome
from tests.store.synthetic import Synthetic

DOTTED = HIDDEN.replace("/", ".")
BY_READERS = {
    f"features.zarr/{INT8}/levels/c/0/0": ("shard", INT8),
    f"features.zarr/{INT8}/scale/c/1": ("shard", INT8),
    f"features.zarr/{HIDDEN}/values/c/2/0": ("shard", HIDDEN),
    "features.zarr/tokens/input_ids/c/0": ("shard", None),
    "features.zarr/tokens/loss_mask/c/1": ("shard", None),
    "features.zarr/examples/start/c/0": ("shard", None),
    "features.zarr/examples/label/c/0": ("shard", None),
    "features.zarr/examples/digest/c/0/0": ("shard", None),
    f"features.zarr/{INT8}/levels/zarr.json": ("zarr.json", INT8),
    "features.zarr/tokens/input_ids/zarr.json": ("zarr.json", None),
    f"manifests/{DOTTED}.json": ("manifest", HIDDEN),
    "manifests/plan.json": ("plan", None),
    "manifest.json": ("index", None),
    "assets/channels/hidden.2.safetensors": ("asset", INT8),
    "assets/lm_head.safetensors": ("asset", None),
    "assets/teacher/config.json": ("asset", None),
    "assets/tokenizer/tokenizer.json": ("asset", None),
}
"""Files that readers read, with what they are and the signal that needs them."""
BY_VERIFY = {
    "features.zarr/zarr.json": "zarr.json",
    f"features.zarr/{HIDDEN}/zarr.json": "zarr.json",
    f"receipts/{DOTTED}/000000.json": "receipt",
    f"receipts/{DOTTED}/declaration.json": "declaration",
    "receipts/assets/lm_head.json": "asset record",
}
"""Files that only capture and verify read; other Zarr readers read the groups' metadata."""
UNREAD = {"lock"}
MANY = 100
"""So that of small files every byte is flipped."""


def places(path: Path) -> Iterator[tuple[str, int]]:
    """Every byte of a file, with the class of position it belongs to."""
    data = path.read_bytes()
    if path.suffix == ".json":
        yield from _places_in_json(data.decode())
    elif path.suffix == ".safetensors":
        header = 8 + int.from_bytes(data[:8], "little")
        for position in range(len(data)):
            yield "length" if position < 8 else "header" if position < header else "data", position
    else:
        yield from _places_in_shard(data)


def _places_in_json(text: str) -> Iterator[tuple[str, int]]:
    tokens = r'(?P<key>"[^"]*"(?=\s*:))|(?P<text>"[^"]*")|(?P<number>[-\d.eE+]+)|(?P<space>\s+)'
    for found in re.finditer(rf"{tokens}|(?P<word>[a-z]+)|(?P<mark>.)", text):
        for position in range(*found.span()):
            yield str(found.lastgroup), position


def _places_in_shard(data: bytes) -> Iterator[tuple[str, int]]:
    """Find the chunks by the index at the end, whose length no file states: by trying."""
    chunks = next(n for n in range(1, 99) if _is_index(data, n))
    footer = len(data) - chunks * INDEX_ENTRY.itemsize - CRC.size
    for position in range(footer, len(data)):
        yield "footer's checksum" if position >= len(data) - CRC.size else "index", position
    for offset, size in np.frombuffer(data, INDEX_ENTRY, chunks, offset=footer).tolist():
        for position in range(size):
            is_header, is_sum = position < BLOSC_HEADER.size, position >= size - CRC.size
            where = "header" if is_header else "chunk's checksum" if is_sum else "body"
            yield where, offset + position


def _is_index(data: bytes, chunks: int) -> bool:
    footer = len(data) - chunks * INDEX_ENTRY.itemsize - CRC.size
    if footer < 0:
        return False
    index = np.frombuffer(data, INDEX_ENTRY, chunks, offset=footer)
    ends = index["offset"] + index["bytes"]
    return int(index["offset"][0]) == 0 and int(ends[-1]) == footer


def chosen(path: Path, each: int) -> list[tuple[int, int]]:
    """Positions, a bit of each: first and last byte, and of every class `each` places."""
    size = path.stat().st_size
    by_class = defaultdict(list)
    for where, position in places(path):
        by_class[where].append(position)
    assert sum(map(len, by_class.values())) == size
    random = np.random.default_rng(size)
    found = {0, size - 1}
    for positions in by_class.values():
        found.update(random.permutation(positions)[:each].tolist())
    return [(position, int(random.integers(8))) for position in sorted(found)]


def test_every_file_is_of_a_kind_that_is_flipped(whole_store):
    """A file that the store gets one day has to be put on one of the lists."""

    def kind(name: str) -> str:
        name = re.sub(r"/c/[\d/]+", "/c", name)
        name = re.sub(r"(hidden|attention|value|logits)([./]\d)?[./][\w.-]+", "SIGNAL", name)
        return re.sub(r"(tokens|examples)/\w+|\d{6}|SIGNAL/\w+", "SOME", name)

    files = [p.relative_to(whole_store).as_posix() for p in whole_store.rglob("*") if p.is_file()]
    listed = {kind(name) for name in [*BY_READERS, *BY_VERIFY, *UNREAD]}
    groups = {kind(name) for name in files if name.endswith("zarr.json")}
    assert {kind(name) for name in files} - groups <= listed


@pytest.mark.parametrize("relative", BY_READERS)
def test_readers_find_it(store, whole_store, ledger, times, relative):
    what, signal = BY_READERS[relative]
    path = store / relative
    for position, bit in chosen(path, times(3, MANY)):
        flip(path, position, bit)
        found = outcome(store, whole_store, [] if signal is None else [signal])
        ledger.record(f"flipped bit: {what}", detected=found == "refused", wrong=found == "wrong")
        assert found == "refused", (position, bit)
        flip(path, position, bit)
    assert outcome(store, whole_store, [] if signal is None else [signal]) == "same"


@pytest.mark.parametrize("relative", BY_VERIFY)
def test_verify_finds_it(store, whole_store, ledger, times, relative):
    """And names the file; readers, who do not read it, go on reading what is true."""
    what, path = BY_VERIFY[relative], store / relative
    for position, bit in chosen(path, times(1, MANY)):
        flip(path, position, bit)
        damaged = {damage.file for state in verify_store(store) for damage in state.damage}
        ledger.record(f"flipped bit: {what}", detected=damaged == {relative})
        assert damaged == {relative}, (position, bit)
        flip(path, position, bit)
    flip(path, 1, 0)
    assert outcome(store, whole_store) == "same"


@pytest.mark.usefixtures("unsynced")
def test_capture_trusts_no_flipped_receipt(store, ledger, times):
    """It computes the segment again instead."""
    writer, path = Synthetic(store).writer(HIDDEN), Layout(store).receipt(HIDDEN, 0)
    for position, bit in chosen(path, times(2, MANY)):
        flip(path, position, bit)
        trusted = writer.receipts(verify=True)
        ledger.record("flipped bit: receipt", detected=0 not in trusted)
        assert 0 not in trusted
        flip(path, position, bit)
    assert 0 in writer.receipts(verify=True)


def test_the_error_names_the_file(store):
    relative = f"features.zarr/{INT8}/levels/c/0/0"
    flip(store / relative, 30, 3)
    with pytest.raises(IntegrityError, match=rf"{relative}: found checksum \w+, expected"):
        StoreReader(store).read_segment(0, [INT8])
