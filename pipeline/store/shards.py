"""Whole shards on disk: written aside, made durable, renamed; checked whole before use.

One segment is one shard of every array, and a shard is one file. Zarr's own writers neither sync
nor (zarrs) rename, so a shard is encoded into a staging array of the same metadata and its file is
moved into place. Zarr's chunk checksums do not see a missing chunk, a zero-length shard or two
swapped files; the whole-file CRC does.
"""

import math
import os
import shutil
import struct
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, BytesCodec, Crc32cCodec, ShardingCodec

from pipeline.errors import IntegrityError, ResourceError
from pipeline.provenance import fsync_directory
from pipeline.store.forms.form import Part

READER = "zarrs.ZarrsCodecPipeline"
"""1.5 to 4 times less CPU than zarr's own codec pipeline."""
WRITER = "zarr.core.codec_pipeline.BatchedCodecPipeline"
"""zarr's own: zarrs leaves out chunks of zeros whatever is asked, and then a lost chunk
looks like an empty one."""
OPENING = threading.Lock()
BLOSC_HEADER = struct.Struct("<4xIII")  # decoded bytes, block size, encoded bytes
SHARD_ENTRY = np.dtype([("offset", "<u8"), ("bytes", "<u8")])
MISSING_CHUNK = 2**64 - 1


def _array_arguments(part: Part, rows: int, shard_rows: int, chunk_rows: int) -> dict[str, Any]:
    zeros = len(part.row_shape)
    inner = (
        BytesCodec(),
        BloscCodec(
            typesize=np.dtype(part.dtype).itemsize, cname="zstd", clevel=3, shuffle="bitshuffle"
        ),
        Crc32cCodec(),
    )
    sharding = ShardingCodec(
        chunk_shape=(chunk_rows, *part.row_shape),
        codecs=inner,
        index_codecs=(BytesCodec(), Crc32cCodec()),
    )
    return {
        "shape": (rows, *part.row_shape),
        "dtype": part.dtype,
        "chunks": (shard_rows, *part.row_shape),
        "serializer": sharding,
        "compressors": None,
        "filters": None,
        "fill_value": 0,
        "config": {"write_empty_chunks": True},
        "dimension_names": ("row", *(f"axis_{i + 1}" for i in range(zeros))),
        "zarr_format": 3,
    }


def create_array(path: Path, part: Part, *, rows: int, shard_rows: int, chunk_rows: int) -> None:
    """Create the metadata of one part's array; no data is written.

    Raises:
        IntegrityError: If an array of other metadata is there already.
    """
    wanted = _array_arguments(part, rows, shard_rows, chunk_rows)
    if (path / "zarr.json").exists():
        found = zarr.open_array(path, mode="r")
        if (found.shape, str(found.dtype)) != (wanted["shape"], part.dtype):
            raise IntegrityError(
                f"{path}: found an array {found.dtype}{found.shape}, expected "
                f"{part.dtype}{wanted['shape']}; delete the array's directory and capture again"
            )
        return
    zarr.create_array(store=path, **wanted)


def shard_file(array: Path, segment: int, dimensions: int) -> Path:
    """Return the file of one segment's shard in an array of `dimensions` axes."""
    return array.joinpath("c", str(segment), *["0"] * (dimensions - 1))


class ShardWriter:
    """Writes whole shards durably. Instances are used by one thread at a time.

    Args:
        staging: Directory on the same file system as the store.
        chunk_rows: Rows of a chunk, the unit of reading.
    """

    def __init__(self, staging: Path, chunk_rows: int) -> None:
        self._directory = staging / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._chunk_rows = chunk_rows

    def write(self, target: Path, values: NDArray[Any]) -> dict[str, int]:
        """Encode `values` as one shard and move it to `target`.

        Returns:
            Size and crc32c of the whole file, as a receipt records them.

        Raises:
            ResourceError: If the file system refuses.
        """
        part = Part(str(values.dtype), values.shape[1:])
        staged = self._directory / uuid.uuid4().hex[:8]
        try:
            arguments = _array_arguments(part, len(values), len(values), self._chunk_rows)
            with zarr.config.set({"codec_pipeline.path": WRITER}):
                array = zarr.create_array(store=staged, **arguments)
                array[...] = np.ascontiguousarray(values)
            file = shard_file(staged, 0, values.ndim)
            data = file.read_bytes()
            with file.open("rb") as descriptor:
                os.fsync(descriptor.fileno())
            target.parent.mkdir(parents=True, exist_ok=True)
            file.replace(target)
            fsync_directory(target.parent)
        except OSError as error:
            raise ResourceError(
                f"{target}: shard cannot be written ({error.strerror or error}); free space or fix "
                "permissions, then run the same command again: finished segments are kept"
            ) from error
        finally:
            shutil.rmtree(staged, ignore_errors=True)
        return {"bytes": len(data), "crc32c": google_crc32c.value(data)}

    def close(self) -> None:
        """Remove what was staged."""
        shutil.rmtree(self._directory, ignore_errors=True)


@contextmanager
def shard_writer(staging: Path, chunk_rows: int) -> Iterator[ShardWriter]:
    """A `ShardWriter` that cleans up after itself."""
    writer = ShardWriter(staging, chunk_rows)
    try:
        yield writer
    finally:
        writer.close()


def file_digest(path: Path, root: Path) -> dict[str, int]:
    """Return size and crc32c of a file that must lie inside `root`, following no link out of it.

    Raises:
        IntegrityError: If the file is missing, unreadable or outside.
    """
    data = read_inside(path, root)
    return {"bytes": len(data), "crc32c": google_crc32c.value(data)}


def read_inside(path: Path, root: Path) -> bytes:
    """Read a regular file whose real place is inside `root`.

    Raises:
        IntegrityError: If it is missing, unreadable, or a link leads out of the store.
    """
    try:
        real = path.resolve(strict=True)
        if not real.is_relative_to(root.resolve()) or path.is_symlink():
            raise IntegrityError(
                f"{path}: a link leads to {real}, outside the store; expected a file of the "
                f"store itself"
            )
        return real.read_bytes()
    except OSError as error:
        raise IntegrityError(
            f"{path}: cannot be read ({error.strerror}); run capture again to rebuild this segment"
        ) from error


def check_file(path: Path, root: Path, expected: dict[str, int]) -> bytes:
    """Return the bytes of a file after comparing size and crc32c with its receipt.

    Raises:
        IntegrityError: If they differ; nothing of the file was used.
    """
    data = read_inside(path, root)
    found = {"bytes": len(data), "crc32c": google_crc32c.value(data)}
    if found != expected:
        raise IntegrityError(
            f"{path}: found {found['bytes']} bytes with crc32c {found['crc32c']:08x}, expected "
            f"{expected['bytes']} with {expected['crc32c']:08x}; run capture again to rebuild it"
        )
    return data


def check_chunk_sizes(data: bytes, path: Path, *, chunks: int, chunk_bytes: int) -> None:
    """Check, before anything is allocated, that each chunk is there and claims its size.

    Raises:
        IntegrityError: If a chunk is missing, outside the file, or claims another size.
    """
    index_bytes = chunks * SHARD_ENTRY.itemsize + 4
    if len(data) < index_bytes:
        raise IntegrityError(
            f"{path}: {len(data)} bytes, expected an index of {index_bytes} at least"
        )
    index = np.frombuffer(data, SHARD_ENTRY, chunks, offset=len(data) - index_bytes)
    for number, (offset, size) in enumerate(index.tolist()):
        if offset == MISSING_CHUNK or offset + size > len(data) or size < BLOSC_HEADER.size:
            raise IntegrityError(
                f"{path}: chunk {number} of {chunks} is missing or outside the file"
            )
        decoded, _, encoded = BLOSC_HEADER.unpack_from(data, offset)
        if decoded != chunk_bytes or encoded + 4 != size:
            raise IntegrityError(
                f"{path}: chunk {number} claims {decoded} bytes decoded, expected {chunk_bytes}"
            )


def read_shard(
    array_path: Path,
    root: Path,
    *,
    segment: int,
    part: Part,
    shard_rows: int,
    chunk_rows: int,
    expected: dict[str, int] | None,
) -> NDArray[Any]:
    """Read one segment of an array, checking the whole file first when `expected` is given.

    Raises:
        IntegrityError: If file, chunks, shape or dtype are not those the manifest states.
    """
    file = shard_file(array_path, segment, 1 + len(part.row_shape))
    if expected is not None:
        data = check_file(file, root, expected)
        chunk_bytes = chunk_rows * math.prod(part.row_shape) * np.dtype(part.dtype).itemsize
        check_chunk_sizes(data, file, chunks=shard_rows // chunk_rows, chunk_bytes=chunk_bytes)
    read_inside(array_path / "zarr.json", root)
    try:
        # The pipeline is chosen when the array is opened, from a setting of the whole process.
        with OPENING, zarr.config.set({"codec_pipeline.path": READER}):
            array = zarr.open_array(array_path, mode="r")
        if (str(array.dtype), array.shape[1:]) != (part.dtype, part.row_shape) or (
            array.shards != (shard_rows, *part.row_shape)
            or array.chunks != (chunk_rows, *part.row_shape)
        ):
            raise IntegrityError(
                f"{array_path}: found {array.dtype}{array.shape} in shards of {array.shards}, "
                f"expected "
                f"{part.dtype} rows of {part.row_shape} in shards of {shard_rows}; the store "
                f"was altered"
            )
        return np.asarray(array[segment * shard_rows : (segment + 1) * shard_rows])
    except (RuntimeError, ValueError, OSError, KeyError) as error:
        raise IntegrityError(f"{file}: cannot be decoded ({error}); capture it again") from error
