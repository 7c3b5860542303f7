"""Reads and writes the files of a store: atomic, durable writes and checked reads.

A segment is one shard of each array, and a shard is one file. Zarr's chunk checksums do not detect
a missing chunk, an empty shard or two swapped files; size and xxh3 of the file do. A link, a pipe
or a file of another size is refused before it is read.

Any process may stage shards in the directory of its attempt; only the holder of the store's lock
moves them into place. A worker that outlives its capture therefore does no harm: the next capture
removes that directory.

The checksum of a file must not be a crc32c. The CRC of bytes that end in their own CRC depends only
on their number, so that all shards with chunks of equal sizes would have the same checksum.
"""

import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.errors import IncompatibleError, IntegrityError, ResourceError
from pipeline.provenance import (
    fsync_directory,
    make_directory,
    refused,
    write_bytes_atomically,
    write_file,
)
from pipeline.store.codec import (
    array_metadata,
    decode_shard,
    encode_shard,
    group_metadata,
    most_bytes,
)
from pipeline.store.forms.form import ArrayType
from pipeline.store.layout import Layout

BLOCK_BYTES = 2**20
MAX_SHARD_BYTES = 2**32
"""The most bytes of a decoded shard; several segments are in memory while students train."""
METADATA = "zarr.json"


@dataclass(frozen=True)
class ArraySpec:
    """An array of a store.

    Attributes:
        array_type: Its dtype, and shape and axis names of a row.
        rows: Rows of the array.
        shard_rows: Rows of a shard, the unit of writing.
        chunk_rows: Rows of a chunk, the unit of reading for other Zarr readers.
        axis: The name of the first axis; empty as in stores of the first release.
    """

    array_type: ArrayType
    rows: int
    shard_rows: int
    chunk_rows: int
    axis: str = ""

    def metadata(self) -> bytes:
        """Return the array's `zarr.json`."""
        return self.accepted_metadata()[0]

    def accepted_metadata(self) -> tuple[bytes, ...]:
        """Return each accepted `zarr.json`: the present one, and one without axis names."""
        named = (self.axis, *self.array_type.row_axes) if self.axis else ()
        sizes = {
            "rows": self.rows,
            "shard_rows": self.shard_rows,
            "chunk_rows": self.chunk_rows,
        }
        return array_metadata(self.array_type, axes=named, **sizes), array_metadata(
            self.array_type, **sizes
        )

    def check_size(self, array: Path, file_bytes: int) -> None:
        """Refuse a shard with too many bytes, before anything is read or allocated.

        Raises:
            IncompatibleError: If its values would take more memory than a shard may.
            IntegrityError: If its file is larger than its encoded values can be.
        """
        row_bytes = math.prod(self.array_type.row_shape) * np.dtype(self.array_type.dtype).itemsize
        decoded = self.shard_rows * row_bytes
        if decoded > MAX_SHARD_BYTES:
            raise IncompatibleError(
                f"{array}: {decoded} bytes a segment, expected at most {MAX_SHARD_BYTES}; capture "
                "with a lower segment_tokens"
            )
        most = most_bytes(decoded, self.shard_rows // self.chunk_rows)
        if file_bytes > most:
            raise IntegrityError(
                f"{array}: a shard's record claims {file_bytes} bytes, expected at most {most}; "
                "capture this store again"
            )


def create_array(features: Path, name: str, spec: ArraySpec) -> None:
    """Write the metadata of an array and of the groups above it where it is missing or differs.

    Args:
        features: The root group.
        name: Path of the array below the root group.
        spec: The array.
    """
    array = features / name
    groups = [parent for parent in array.parents if parent.is_relative_to(features)]
    wanted = dict.fromkeys(groups, (group_metadata(),)) | {array: spec.accepted_metadata()}
    for directory, accepted in wanted.items():
        path = directory / METADATA
        try:
            check_metadata(path, features.parent, accepted)
        except IntegrityError:
            write_bytes_atomically(path, accepted[0])


def check_metadata(path: Path, root: Path, accepted: tuple[bytes, ...]) -> None:
    """Compare a `zarr.json` with the metadata that the records imply.

    Raises:
        IntegrityError: If it cannot be read, or is not one of `accepted`.
    """
    if read_inside(path, root, limit=max(map(len, accepted))) not in accepted:
        raise IntegrityError(
            f"{path}: not the metadata that the manifest states; run `decant capture TEACHER "
            "--verify` to rebuild it"
        )


def shard_name(segment: int, array_type: ArrayType) -> str:
    """Return the path of a segment's shard within its array."""
    return "/".join(("c", str(segment), *["0"] * len(array_type.row_shape)))


def write_shard(layout: Layout, name: str, values: NDArray[Any], chunk_rows: int) -> dict[str, int]:
    """Write `values` as the shard `name` of a store, durably.

    Returns:
        Size and checksum of the file, as in receipts.

    Raises:
        ResourceError: If the file system refuses.
    """
    data = encode_shard(values, chunk_rows)
    write_bytes_atomically(layout.root / name, data, aside=layout.staging)
    return bytes_digest(data)


def bytes_digest(data: bytes) -> dict[str, int]:
    """Return the size and xxh3 of a file's content, as in records."""
    return {"bytes": len(data), "xxh3": xxhash.xxh3_64_intdigest(data)}


@contextmanager
def _opened(
    path: Path, root: Path, size: int | None, limit: int | None = None
) -> Iterator[BinaryIO]:
    """Open a regular file of `size` bytes whose real path is inside `root`."""
    try:
        real = path.parent.resolve(strict=True)
        _check_inside(real.is_relative_to(_real(root.absolute())), path, real)
        # O_NONBLOCK: a pipe in place of a file must not block the reader.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{path}: cannot be read ({error}); run `decant capture TEACHER --verify` to rebuild it"
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        # Python raises an error of its own when it opens a directory by its descriptor.
        os.close(descriptor)
        _check_inside(False, path, real)
    with os.fdopen(descriptor, "rb") as file:
        if size is not None and status.st_size != size:
            raise IntegrityError(
                f"{path}: found {status.st_size} bytes, expected {size}; run `decant capture "
                "TEACHER --verify` to rebuild it"
            )
        if limit is not None and status.st_size > limit:
            raise IntegrityError(
                f"{path}: found {status.st_size} bytes, expected at most {limit}; run `decant "
                "capture TEACHER --verify` to rebuild it"
            )
        yield file


@lru_cache(maxsize=64)
def _real(root: Path) -> Path:
    """Return the real path of a store, cached because it is half the cost of opening a file.

    If a store is moved while it is read, its files are refused.
    """
    return root.resolve()


def _check_inside(is_inside: bool, path: Path, real: Path) -> None:
    if not is_inside:
        raise IntegrityError(
            f"{path}: is {real / path.name}, expected a regular file inside the store"
        )


def read_inside(
    path: Path, root: Path, size: int | None = None, *, limit: int | None = None
) -> bytes:
    """Read a regular file whose real path is inside `root`.

    Args:
        path: The file.
        root: The store.
        size: The size it must have, in bytes.
        limit: The most bytes it may have; a larger file is not read.

    Raises:
        IntegrityError: If it is missing, unreadable, of another size, or a link leads out.
    """
    with _opened(path, root, size, limit) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def file_digest(path: Path, root: Path) -> dict[str, int]:
    """Return size and xxh3 of a file inside `root`, using constant memory.

    Raises:
        IntegrityError: If it is missing, unreadable, or a link leads out.
    """
    digest, size = xxhash.xxh3_64(), 0
    with _opened(path, root, None) as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            size += len(block)
    return {"bytes": size, "xxh3": digest.intdigest()}


def matches(path: Path, root: Path, expected: dict[str, int], *, verify: bool) -> bool:
    """Tell whether a file exists with its size and, if `verify`, with its checksum."""
    try:
        with _opened(path, root, expected["bytes"]):
            pass
        return not verify or file_digest(path, root) == expected
    except IntegrityError:
        return False


def check_file(
    path: Path, root: Path, expected: dict[str, int], *, limit: int | None = None
) -> bytes:
    """Return the bytes of a file after comparing size and checksum with its record.

    Raises:
        IntegrityError: If they differ, or if it has more bytes than `limit`.
    """
    data = read_inside(path, root, expected["bytes"], limit=limit)
    found = bytes_digest(data)["xxh3"]
    if found != expected["xxh3"]:
        raise IntegrityError(
            f"{path}: found checksum {found:016x}, expected {expected['xxh3']:016x}; run "
            "`decant capture TEACHER --verify` to rebuild it"
        )
    return data


def read_shard(
    array: Path, root: Path, spec: ArraySpec, segment: int, expected: dict[str, int]
) -> NDArray[Any]:
    """Read one segment of an array; it is checked before any of it is decoded.

    Raises:
        IntegrityError: If metadata, file or chunks differ from the manifest.
    """
    spec.check_size(array, expected["bytes"])
    check_metadata(array / METADATA, root, spec.accepted_metadata())
    path = array / shard_name(segment, spec.array_type)
    return decode_shard(
        check_file(path, root, expected),
        spec.array_type,
        shard_rows=spec.shard_rows,
        chunk_rows=spec.chunk_rows,
        name=str(path),
    )


def stage_shard(
    layout: Layout, name: str, values: NDArray[Any], chunk_rows: int, *, attempt: str
) -> dict[str, int]:
    """Write `values` as the future shard `name` of a store, aside and durably.

    Creates no directory: if that of the attempt is gone, another capture has taken over.

    Returns:
        Size and checksum of the file, as in receipts.

    Raises:
        ResourceError: If the attempt is over, or the file system refuses.
    """
    data = encode_shard(values, chunk_rows)
    digest = bytes_digest(data)
    path = layout.staged(attempt, name, digest["xxh3"])
    try:
        write_file(path, data, aside=path.parent)
    except FileNotFoundError as error:
        raise _over(layout, attempt) from error
    except OSError as error:
        raise refused(path, error, len(data)) from error
    return digest


def publish_shards(layout: Layout, files: Mapping[str, dict[str, int]], *, attempt: str) -> None:
    """Move staged shards into place, durably. Only the holder of the store's lock may call this.

    Args:
        layout: The store.
        files: Size and checksum of each shard by its name, as `stage_shard` returns them.
        attempt: The attempt in which they were staged.

    Raises:
        ResourceError: If a staged shard is gone, or the file system refuses.
    """
    if not files:
        return
    targets = [layout.root / name for name in files]
    try:
        for target, (name, entry) in zip(targets, files.items(), strict=True):
            make_directory(target.parent)
            layout.staged(attempt, name, entry["xxh3"]).replace(target)
        # The staging directory is not synced: names that reappear there are deleted unread.
        for directory in {target.parent for target in targets}:
            fsync_directory(directory)
    except FileNotFoundError as error:
        raise _over(layout, attempt) from error
    except OSError as error:
        raise refused(targets[0], error) from error


def _over(layout: Layout, attempt: str) -> ResourceError:
    return ResourceError(
        f"{layout.attempt(attempt)}: is gone, so another capture has taken over this store; let it "
        "finish, or run the same command again"
    )
