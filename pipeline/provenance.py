"""Identity and durability: fingerprints, digests, and writes that are whole or absent.

A fingerprint is the SHA-256 of sorted JSON, so it does not depend on key order, host or time.
"""

import hashlib
import json
import os
import platform
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, IntegrityError, ResourceError


def canonical_json(value: Any) -> bytes:
    """Serialise `value` as sorted, compact UTF-8 JSON; NaN and infinities are refused."""
    return json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def fingerprint(value: Any) -> str:
    """Return the SHA-256, in hexadecimal, of the canonical JSON of `value`."""
    return hashlib.sha256(canonical_json(value)).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be read ({error.strerror}); expected a readable file"
        ) from error


def fsync_directory(path: Path) -> None:
    """Make renames inside `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_directory(path: Path) -> None:
    """Create a directory and what is above it, each made durable in its parent."""
    if not path.is_dir():
        _make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)


def write_bytes_atomically(path: Path, data: bytes, *, aside: Path | None = None) -> None:
    """Write `data` so that after a crash `path` holds all of it or what it held before.

    Args:
        path: The file; directories above it are created.
        data: Its content.
        aside: Directory for the unfinished file, on the same file system; by default beside `path`.

    Raises:
        ResourceError: If the file system refuses, for example because no space is left.
    """
    aside = aside or path.parent
    try:
        _make_directory(path.parent)
        _make_directory(aside)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=aside)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).chmod(0o644)
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        fsync_directory(path.parent)
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be written ({error.strerror}); free space or fix permissions, "
            "then run the same command again: what is finished is kept"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable, sorted JSON, atomically."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes_atomically(path, (text + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file that this software wrote.

    Raises:
        IntegrityError: If the file is missing or is not JSON.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise IntegrityError(f"{path}: missing; run the stage that writes it again") from error
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{path}: not readable as JSON ({error}); run the stage that writes it again"
        ) from error


def software() -> dict[str, str]:
    """Versions of what computes values. Recorded beside results, never part of a digest."""
    names = ("torch", "transformers", "numcodecs", "dask", "numpy")
    found = {
        dist.name: dist.version for name in names for dist in metadata.distributions(name=name)
    }
    return {"python": platform.python_version(), "machine": platform.machine(), **found}
