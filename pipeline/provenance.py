"""Identity and durability: fingerprints, digests, and writes that are whole or absent.

A fingerprint is the SHA-256 of sorted JSON, so it does not depend on key order, host or time.
"""

import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, DecantError, IntegrityError, ResourceError
from pipeline.written_by import remedy

LONGEST_NAME = 200
"""Characters of a file's name that an unfinished one shares, so that the rest of it has room."""
NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Disk full, quota used up, file too large: the errors that a number of bytes explains."""
NO_ROOM_WORDS = (
    *("No space left on device", "Disk quota exceeded", "File too large"),
    *("file write failed", "unexpected pos", "iostream error"),
)
"""How libraries that raise errors of their own say so: safetensors, then `torch.save`."""


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


def sync_what_is_there(paths: Iterable[Path]) -> None:
    """Make files and directories durable that others have written; what is missing is left out.

    A process that was killed between a rename and the sync of its directory leaves a file that
    looks whole to the next one: whoever builds on it must sync it first.

    Raises:
        ResourceError: If the file system refuses.
    """
    for path in sorted(paths):
        try:
            fsync_directory(path)
        except FileNotFoundError:
            continue
        except OSError as error:
            raise refused(path, error) from error


def sync_tree(directory: Path) -> None:
    """Make all that is in `directory` durable, at any depth, whoever wrote it."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        elif path.is_dir():
            fsync_directory(path)
    fsync_directory(directory)


def make_directory(path: Path) -> None:
    """Create a directory and what is above it, each durable before anything is put into it.

    So one that holds something is durable. One that is empty may be what a process that was killed
    left behind before it synced: its parent is synced again.
    """
    if not path.is_dir():
        make_directory(path.parent)
        path.mkdir(exist_ok=True)
        fsync_directory(path.parent)
    elif _is_empty(path) and os.access(path.parent, os.R_OK):
        fsync_directory(path.parent)


def _is_empty(directory: Path) -> bool:
    with os.scandir(directory) as entries:
        return next(entries, None) is None


def replace_directory(place: Path, written: Path) -> None:
    """Put the directory `written` in the place of another, durably: `place` is whole or not there.

    Both are on one file system. Between two renames there is neither; a killed process may leave
    the earlier one beside it, hidden, until the next call. Its files are as readable as the umask
    lets them be; safetensors hides its own from all but their owner.
    """
    readable = written.stat().st_mode & 0o666
    for path in written.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(readable)
    sync_tree(written)
    earlier = place.with_name(f".{place.name}.earlier")
    shutil.rmtree(earlier, ignore_errors=True)
    if place.exists():
        place.rename(earlier)
    written.rename(place)
    fsync_directory(place.parent)
    shutil.rmtree(earlier, ignore_errors=True)


def write_file(path: Path, data: bytes, *, aside: Path) -> None:
    """Write `data` so that `path` holds all of it or what it held before.

    The content is durable before it has its name; the name is once `path.parent` is synced.

    Args:
        path: The file.
        data: Its content.
        aside: Directory for the unfinished file, on the same file system.

    Raises:
        OSError: If the file system refuses; nothing stays behind.
    """
    temporary = aside / unfinished_name(path)
    try:
        # Not tempfile's functions, which hide what they make from everyone whatever the umask says.
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0)
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def unfinished_name(path: Path) -> str:
    """Return a hidden name that no other writer takes, for what becomes `path` when complete."""
    return f".{path.name[:LONGEST_NAME]}.{secrets.token_hex(4)}"


def unfinished_files(directory: Path) -> list[Path]:
    """Return what processes that were killed within `write_file` left at any depth.

    For those alone who keep other writers out: a living process's look the same.
    """
    return [path for path in directory.rglob(".*.????????") if path.is_file()]


def refused(path: Path, error: OSError, needed: int | None = None) -> ResourceError:
    """Return the error for a file system that refuses to write `path`, of `needed` bytes."""
    found = error.strerror
    if needed is not None and error.errno in NO_ROOM:
        found = f"{found}: needs {needed:,} bytes, {free_bytes(path)} free"
    return ResourceError(
        f"{path}: cannot be written ({found}); free space or fix permissions, then run the same "
        "command again: what is finished is kept"
    )


def is_no_room(error: BaseException) -> bool:
    """Tell whether an error, of whatever library, says that the disk or a quota is full."""
    if isinstance(error, DecantError):
        return False
    number = error.errno if isinstance(error, OSError) else None
    return number in NO_ROOM or any(words in str(error) for words in NO_ROOM_WORDS)


@contextmanager
def needing_room(place: Path, needed: int) -> Iterator[None]:
    """Say how much room a library needed that failed to write `place` for want of it.

    Raises:
        ResourceError: With `needed`, in bytes, and those that are free.
    """
    try:
        yield
    except Exception as error:
        if not is_no_room(error):
            raise
        raise ResourceError(
            f"{place}: cannot be written ({' '.join(str(error).split())}: needs about {needed:,} "
            f"bytes, {free_bytes(place)} free); free space, then run the same command again: what "
            "is finished is kept"
        ) from error


def free_bytes(path: Path) -> str:
    """Return what this user may still write where `path` is to be, for a message."""
    for directory in path.parents:
        try:
            return f"{shutil.disk_usage(directory).free:,}"
        except OSError:
            continue
    return "unknown"


def write_bytes_atomically(path: Path, data: bytes, *, aside: Path | None = None) -> None:
    """Write `data` so that after a crash `path` holds all of it or what it held before.

    Args:
        path: The file; directories above it are created.
        data: Its content.
        aside: Directory for the unfinished file, on the same file system; by default beside `path`.

    Raises:
        ResourceError: If the file system refuses, for example because no space is left.
    """
    try:
        make_directory(path.parent)
        if aside is not None:
            # Not durable: what is in it is lost at a crash, and so may it be.
            aside.mkdir(parents=True, exist_ok=True)
        write_file(path, data, aside=aside or path.parent)
        fsync_directory(path.parent)
    except OSError as error:
        raise refused(path, error, len(data)) from error


def json_text(value: Any) -> bytes:
    """Return `value` as readable, sorted JSON; NaN and infinities are refused."""
    text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable, sorted JSON, atomically."""
    write_bytes_atomically(path, json_text(value))


def read_json(path: Path) -> Any:
    """Read a JSON file that this software wrote.

    Args:
        path: The file.

    Raises:
        IntegrityError: If the file is missing or is not JSON; it names the command that writes it.
    """
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise IntegrityError(f"{path}: missing; {remedy(path)}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise IntegrityError(f"{path}: not readable as JSON ({error}); {remedy(path)}") from error


def software() -> dict[str, str]:
    """Versions of what computes values. Recorded beside results, never part of a digest."""
    names = ("torch", "transformers", "numcodecs", "dask", "numpy")
    found = {
        dist.name: dist.version for name in names for dist in metadata.distributions(name=name)
    }
    return {"python": platform.python_version(), "machine": platform.machine(), **found}
