"""Records: every byte of one counts, and its size is looked at before it is read."""

import json
import os
import tracemalloc

import pytest

from pipeline.errors import IntegrityError
from pipeline.store.layout import Layout
from pipeline.store.records import Declaration, Receipt
from pipeline.store.sealed import MAX_BYTES, read_record, record_bytes, write_record
from pipeline.store.shards import bytes_digest

pytestmark = pytest.mark.usefixtures("unsynced")
VALUE = {"b": [1, 2.5, None, "ü\n"], "a": {"c": True}, "e": []}


def test_a_record_comes_back(tmp_path):
    path = tmp_path / "a.json"
    write_record(path, VALUE)
    assert read_record(path, tmp_path) == VALUE
    assert read_record(path, tmp_path, bytes_digest(path.read_bytes())) == VALUE


def test_a_flipped_bit_is_found(tmp_path):
    path = tmp_path / "a.json"
    write_record(path, VALUE)
    data = path.read_bytes()
    pin = bytes_digest(data)
    for bit in range(0, 8 * len(data), 3):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        with pytest.raises(IntegrityError, match=r"a\.json"):
            read_record(path, tmp_path, None if bit % 2 else pin)


@pytest.mark.parametrize(
    "write",
    [
        lambda data: data + b" ",
        lambda data: data.replace(b"  ", b"\t"),
        lambda data: data.replace(b"{\n", b'{\n  "a": 1,\n', 1),
        lambda data: json.dumps(json.loads(data)).encode(),
        lambda data: b"\xef\xbb\xbf" + data,
    ],
    ids=["space", "tab", "key twice", "compact", "byte order mark"],
)
def test_the_same_value_in_other_bytes_is_no_record(tmp_path, write):
    path = tmp_path / "a.json"
    path.write_bytes(write(record_bytes(VALUE)))
    with pytest.raises(IntegrityError, match=r"does not match its seal|not a record of this store"):
        read_record(path, tmp_path)


@pytest.mark.parametrize("text", ["[" * 10**5, '{"a":' * 10**5, "1" * 5000, "null", "[]", "NaN"])
def test_no_text_is_more_than_an_error(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(IntegrityError, match="not a record of this store") as raised:
        read_record(tmp_path / "a.json", tmp_path)
    assert len(str(raised.value)) < 400


def test_a_large_record_is_refused_unread(tmp_path):
    layout = Layout(tmp_path)
    layout.manifests.mkdir()
    for path in (layout.index, layout.plan):
        path.touch()
        os.truncate(path, 100 * 2**20)
        tracemalloc.start()
        with pytest.raises(IntegrityError, match="found 104857600 bytes, expected at most 41943"):
            read_record(path, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


def test_many_segments_have_large_records(tmp_path):
    """What a plan and a manifest may weigh grows with the shards that lie in the store."""
    layout = Layout(tmp_path)
    value = {"files": {f"features.zarr/tokens/{i:0900}": {"bytes": i} for i in range(5_000)}}
    write_record(layout.plan, value)
    assert layout.plan.stat().st_size > MAX_BYTES
    with pytest.raises(IntegrityError, match="expected at most"):
        read_record(layout.plan, tmp_path)
    layout.tokens.mkdir(parents=True)
    for number in range(200):
        (layout.tokens / str(number)).touch()
    assert read_record(layout.plan, tmp_path) == value


RECEIPT = {
    "segment": 0,
    "declaration": "0" * 64,
    "tokens": 3,
    "examples": 1,
    "rows": "0" * 32,
    "content": "0" * 64,
    "skipped": [],
    "files": {"features.zarr/a": {"bytes": 1, "xxh3": 2}},
}
DECLARATION = {
    "signal": "hidden/2/int8-0f737721",
    "kind": "hidden",
    "layer": 2,
    "form": "int8",
    "form_version": 1,
    "options": {},
    "geometry": {"width": 6, "heads": 0, "kv_heads": 0, "d_head": 0, "vocab": 0},
    "splits": ["train"],
    "info": {},
    "channels": None,
}


@pytest.mark.parametrize(
    "change",
    [
        {"segment": -1},
        {"segment": "0"},
        {"tokens": 1.5},
        {"skipped": 3},
        {"skipped": [-1]},
        {"rows": None},
        {"files": []},
        {"files": {"../outside": {"bytes": 1, "xxh3": 2}}},
        {"files": {"/etc/passwd": {"bytes": 1, "xxh3": 2}}},
        {"files": {"é" * 128: {"bytes": 1, "xxh3": 2}}},
        {"files": {"features.zarr/a": {"bytes": "1", "xxh3": 2}}},
        {"files": {"features.zarr/a": {"bytes": -1, "xxh3": 2}}},
        {"files": {"features.zarr/a": {"bytes": 1}}},
        {"more": 1},
    ],
    ids=str,
)
def test_a_receipt_of_other_types_or_names_is_refused(change):
    assert Receipt.from_json(RECEIPT).segment == 0
    with pytest.raises(IntegrityError, match="receipt"):
        Receipt.from_json(RECEIPT | change)


@pytest.mark.parametrize(
    "change",
    [
        {"signal": "../../outside"},
        {"signal": "/etc/passwd"},
        {"signal": "hidden/3/int8-0f737721"},
        {"kind": "secret"},
        {"layer": -1},
        {"layer": True},
        {"form_version": "1"},
        {"options": None},
        {"geometry": {"width": -6}},
        {"geometry": {"width": 2**40}},
        {"splits": "train"},
        {"splits": ["dev"]},
        {"info": {"lm_head": {"file": "../secret", "bytes": 1, "xxh3": 1}}},
        {"channels": {"bytes": 1.5, "xxh3": 1}},
    ],
    ids=str,
)
def test_a_declaration_of_other_types_or_names_is_refused(change):
    assert Declaration.from_json(DECLARATION).layer == 2
    with pytest.raises(IntegrityError, match="declaration"):
        Declaration.from_json(DECLARATION | change)
