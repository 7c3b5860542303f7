"""The store's JSON records carry a digest of themselves: a flipped bit in one is never believed.

There is one way to write a record, so every byte of it counts, spaces too. Its size is looked at
before it is read: a record grows with the segments of its store and with nothing else.
"""

import json
import os
from pathlib import Path
from typing import Any

from pipeline.errors import IntegrityError
from pipeline.provenance import fingerprint, json_text, write_bytes_atomically
from pipeline.store.layout import Layout
from pipeline.store.shards import check_file, read_inside

SEAL = "seal"
MAX_BYTES = 4 * 2**20
"""Of a record in a store of few segments; of an index always: it is one of 10,000 signals."""
SEGMENT_BYTES = 2**14
"""What each segment may add to plan or manifest: a receipt of a dozen shards has 2,000 bytes, and
every example that was skipped adds a dozen."""


def _limit(path: Path, root: Path) -> int:
    """Return the most bytes that a record may have.

    A large record is believed in a store of many segments alone, and these are counted by their
    token shards: no record says how many there are before it is read.
    """
    layout = Layout(root)
    try:
        if path == layout.index or path.lstat().st_size <= MAX_BYTES:
            return MAX_BYTES
        with os.scandir(layout.tokens) as shards:
            return MAX_BYTES + SEGMENT_BYTES * sum(1 for _ in shards)
    except OSError:
        return MAX_BYTES


def record_bytes(value: dict[str, Any]) -> bytes:
    """Return a record as the bytes of its file, sealed."""
    return json_text({**value, SEAL: fingerprint(value)})


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Write a record, sealed, atomically."""
    write_bytes_atomically(path, record_bytes(value))


def read_record(path: Path, root: Path, expected: dict[str, int] | None = None) -> dict[str, Any]:
    """Return a record that `write_record` wrote.

    Args:
        path: The record's file.
        root: The store; a link that leads out of it is refused.
        expected: Size and checksum where another record pins this one.

    Raises:
        IntegrityError: If it is missing, altered, too large, or not the one that is pinned.
    """
    limit = _limit(path, root)
    if expected is None:
        data = read_inside(path, root, limit=limit)
    else:
        data = check_file(path, root, expected, limit=limit)
    try:
        value = json.loads(data)
        seal = value.pop(SEAL)
        # A checksum has seen every byte of a pinned record; another is compared with what it must
        # be, byte for byte: a seal does not see spaces, or a key that is there twice.
        is_whole = fingerprint(value) == seal and (
            expected is not None or data == record_bytes(value)
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{path}: not a record of this store ({str(error)[:80]!r}); run "
            "`decant capture TEACHER --verify` to rebuild it"
        ) from error
    if not is_whole:
        raise IntegrityError(
            f"{path}: its content does not match its seal; run "
            "`decant capture TEACHER --verify` to rebuild it"
        )
    return value
