"""Files of a store: written whole and durable or not at all; read only if they are what they were.

One segment is one shard of every array, and a shard is one file. Zarr's chunk checksums do not see
a missing chunk, a zero-length shard or two swapped files; size and xxh3 of the whole file do. A
link, a pipe, or a file of another size is refused before it is read.

The checksum of a file must not be a crc32c: bytes followed by their own CRC leave a CRC in a state
that depends on their number alone, so all shards with chunks of the same sizes have the same one.
"""

import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from numpy.typing import NDArray

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.provenance import write_bytes_atomically
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
"""Of a shard's values in memory, where a few segments lie side by side while students train."""
METADATA = "zarr.json"


@dataclass(frozen=True)
class ArraySpec:
    """An array of a store: what its rows are, and how many lie in all, in a shard and in a chunk.

    A shard is the unit of writing, a chunk the unit of reading for other Zarr readers. `axis` is
    what a row is.
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
        """Return what its `zarr.json` may be: as now, or as before axes had names."""
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
        """Refuse, before anything is read or allocated, a shard of more bytes than it can have.

        Raises:
            IncompatibleError: If its values would take more memory than any shard may.
            IntegrityError: If its file would be larger than its values encoded at the worst.
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
    """Write the metadata of an array and of the groups above it, where it is not there as stated.

    Args:
        features: The root group.
        name: Path of the array below it.
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
    """Compare a `zarr.json` with what the records imply.

    Raises:
        IntegrityError: If it cannot be read, or is none of the `accepted`.
    """
    if read_inside(path, root, limit=max(map(len, accepted))) not in accepted:
        raise IntegrityError(
            f"{path}: not the metadata that the manifest states; run `decant capture TEACHER "
            "--verify` to rebuild it"
        )


def shard_name(segment: int, array_type: ArrayType) -> str:
    """Return the name, within its array, of one segment's shard."""
    return "/".join(("c", str(segment), *["0"] * len(array_type.row_shape)))


def write_shard(layout: Layout, name: str, values: NDArray[Any], chunk_rows: int) -> dict[str, int]:
    """Write `values` as the shard `name` of a store, durably.

    Returns:
        Size and checksum of the file, as receipts hold them.

    Raises:
        ResourceError: If the file system refuses.
    """
    data = encode_shard(values, chunk_rows)
    write_bytes_atomically(layout.root / name, data, aside=layout.staging)
    return bytes_digest(data)


def bytes_digest(data: bytes) -> dict[str, int]:
    """Return the size and xxh3 of a file's content, as records hold them."""
    return {"bytes": len(data), "xxh3": xxhash.xxh3_64_intdigest(data)}


@contextmanager
def _opened(
    path: Path, root: Path, size: int | None, limit: int | None = None
) -> Iterator[BinaryIO]:
    """Open a regular file of `size` bytes that is really inside `root`, following no link out."""
    try:
        real = path.parent.resolve(strict=True)
        _check_inside(real.is_relative_to(_real(root.absolute())), path, real)
        # O_NONBLOCK: a pipe in the place of a file must not make the reader wait for ever.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{path}: cannot be read ({error}); run `decant capture TEACHER --verify` to rebuild it"
        ) from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        # Python opens no directory by its descriptor, with an error of its own.
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
    """Return where a store really is: asked for each of its files, and half of what opening costs.

    One that is moved while it is read is then refused, and never read for another.
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
    """Read a regular file whose real place is inside `root`.

    Args:
        path: The file.
        root: The store.
        size: Bytes that it must have.
        limit: Bytes that it may have at most; none of it is read if it has more.

    Raises:
        IntegrityError: If it is missing, unreadable, of another size, or a link leads out.
    """
    with _opened(path, root, size, limit) as file:
        return file.read(os.fstat(file.fileno()).st_size)


def file_digest(path: Path, root: Path) -> dict[str, int]:
    """Return size and xxh3 of a file inside `root`, in constant memory.

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
    """Tell whether a file is there with its size, and with its checksum if `verify`."""
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
        IntegrityError: If they differ, or it has more bytes than `limit`; nothing was used.
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
    """Read one segment of an array, all of it checked before any of it is decoded.

    Raises:
        IntegrityError: If metadata, file or chunks are not those that the manifest states.
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
