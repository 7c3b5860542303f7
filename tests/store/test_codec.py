"""Shards: what we write, other Zarr readers read, and the other way round."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pipeline.errors import IntegrityError
from pipeline.store.codec import CRC, INDEX_ENTRY, decode_shard, encode_shard
from pipeline.store.forms.form import ArrayType
from pipeline.store.shards import ArraySpec, create_array, shard_name

DTYPES = ["int8", "uint8", "uint16", "uint32", "int32", "int64", "float16", "float32"]
ARRAYS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: st.tuples(st.sampled_from([(), (3,), (2, 3)]), st.integers(1, 3)).flatmap(
        lambda shape: hnp.arrays(dtype, (shape[1] * 4, *shape[0]))
    )
)


def decode(data: bytes, values: np.ndarray, chunk_rows: int) -> np.ndarray:
    part = ArrayType(str(values.dtype), values.shape[1:])
    return decode_shard(data, part, shard_rows=len(values), chunk_rows=chunk_rows, name="shard")


@settings(max_examples=60, deadline=None)
@given(ARRAYS, st.sampled_from([1, 2, 4]))
def test_a_shard_decodes_to_its_bytes(values, chunk_rows):
    found = decode(encode_shard(values, chunk_rows), values, chunk_rows)
    assert found.dtype == values.dtype
    assert found.tobytes() == values.tobytes()


@pytest.mark.parametrize("pipeline", ["zarr.core.codec_pipeline.BatchedCodecPipeline", "zarrs"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("row_shape", [(), (3,), (2, 3)])
def test_any_zarr_reader_reads_it(tmp_path, pipeline, dtype, row_shape):
    if pipeline == "zarrs":
        pytest.importorskip("zarrs")
        pipeline = "zarrs.ZarrsCodecPipeline"
    values = (np.arange(16 * np.prod(row_shape, dtype=int)) % 100).astype(dtype)
    values = values.reshape(16, *row_shape)
    spec = ArraySpec(ArrayType(dtype, row_shape), rows=16, shard_rows=8, chunk_rows=4)
    create_array(tmp_path, "hidden/1/form", spec)
    for segment in range(2):
        path = tmp_path / "hidden/1/form" / shard_name(segment, spec.array_type)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_shard(values[segment * 8 : segment * 8 + 8], 4))
    with zarr.config.set({"codec_pipeline.path": pipeline}):
        array = zarr.open_group(tmp_path, mode="r")["hidden/1/form"]
        assert isinstance(array, zarr.Array)
        np.testing.assert_array_equal(np.asarray(array[...]), values, strict=True)


def test_the_metadata_is_what_zarr_itself_writes(tmp_path):
    """So it keeps its meaning should Zarr change what it takes for granted."""
    spec = ArraySpec(ArrayType("float16", (3,)), rows=16, shard_rows=8, chunk_rows=4)
    create_array(tmp_path / "ours", "a", spec)
    zarr.create_array(
        store=tmp_path / "theirs",
        shape=(16, 3),
        dtype="float16",
        chunks=(4, 3),
        shards=(8, 3),
        compressors=[
            zarr.codecs.BloscCodec(typesize=2, cname="zstd", clevel=3, shuffle="bitshuffle"),
            zarr.codecs.Crc32cCodec(),
        ],
        fill_value=0,
        dimension_names=("row", "axis_1"),
    )
    ours, theirs = (
        json.loads((tmp_path / name / "zarr.json").read_bytes()) for name in ("ours/a", "theirs")
    )
    theirs.pop("storage_transformers", None)
    assert ours == theirs


def test_chunks_of_zeros_are_written():
    """Left out, they would look like lost ones."""
    values = np.zeros((8, 3), np.int8)
    data = encode_shard(values, 2)
    index = np.frombuffer(data, INDEX_ENTRY, 4, offset=len(data) - 4 * 16 - 4)
    assert (index["bytes"] > 16).all()


def test_rows_must_fill_chunks():
    with pytest.raises(ValueError, match="7 rows in chunks of 2"):
        encode_shard(np.zeros(7), 2)


def with_index(data: bytes, chunks: int, change) -> bytes:
    """The shard with another index, checksum included, as a forger would write it."""
    footer = chunks * INDEX_ENTRY.itemsize + CRC.size
    index = np.frombuffer(data, INDEX_ENTRY, chunks, offset=len(data) - footer).copy()
    change(index)
    import google_crc32c

    table = index.tobytes()
    return data[:-footer] + table + CRC.pack(google_crc32c.value(table))


VALUES = np.arange(24, dtype=np.int32).reshape(8, 3)
GOOD = encode_shard(VALUES, 2)


def bomb(data: bytes, decoded: int) -> bytes:
    """The first chunk claims to be `decoded` bytes."""
    return data[:4] + struct.pack("<I", decoded) + data[8:]


def missing(index):
    index[2] = (2**64 - 1, 2**64 - 1)


def outside(index):
    index["offset"][1] = 2**40


def wrapping(index):
    index[1] = (2**64 - 8, 24)


def into_the_index(index):
    index["offset"][3] += 8


def short(index):
    index["bytes"][0] = 8


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "0 bytes, expected 68 at least"),
        (GOOD[:50], "50 bytes, expected 68"),
        (with_index(GOOD, 4, missing), "chunk 2 of 4 is missing"),
        (with_index(GOOD, 4, outside), "chunk 1 of 4 is missing or cut off"),
        (with_index(GOOD, 4, wrapping), "chunk 1 of 4 is missing or cut off"),
        (with_index(GOOD, 4, into_the_index), "chunk 3 of 4 is missing or cut off"),
        (with_index(GOOD, 4, short), "chunk 0 of 4 is missing"),
        (bomb(GOOD, 2**31), "chunk 0 claims 2147483648 bytes decoded .* expected 24"),
        (bomb(GOOD, 0), "chunk 0 claims 0 bytes"),
    ],
)
def test_a_forged_shard_is_refused_before_it_is_decoded(data, match):
    with pytest.raises(IntegrityError, match=match):
        decode(data, VALUES, 2)


def test_metadata_is_mended_and_left_alone_when_right(tmp_path: Path):
    spec = ArraySpec(ArrayType("int8", ()), rows=4, shard_rows=4, chunk_rows=4)
    create_array(tmp_path, "a", spec)
    path = tmp_path / "a" / "zarr.json"
    before = path.stat().st_mtime_ns
    create_array(tmp_path, "a", spec)
    assert path.stat().st_mtime_ns == before
    path.write_text("{}")
    create_array(tmp_path, "a", spec)
    assert path.read_bytes() == spec.metadata()


def test_bytes_of_normal_levels_take_little_more_than_their_entropy():
    """Which bit planes would hide: 6.4 bits a level here, and all 8 shuffled."""
    random = np.random.default_rng(0)
    levels = np.round(random.standard_normal((2048, 128)) * 20).astype(np.int8)
    entropy_bytes = np.log2(20 * np.sqrt(2 * np.pi * np.e)) / 8
    assert len(encode_shard(levels, 256)) < 1.03 * entropy_bytes * levels.size
