"""Sealed JSON records: each contains its own digest, so that altered records are detected.

There is one way to write a record, so every byte counts, including spaces. The size is checked
before reading: a record grows only with the number of segments.
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
"""The most bytes of a record in a store of few segments; of an index always: 10,000 signals."""
SEGMENT_BYTES = 2**14
"""Bytes that each segment may add to plan or manifest: a receipt of a dozen shards has 2,000
bytes, and every skipped example adds a dozen."""


def _limit(path: Path, root: Path) -> int:
    """Return the most bytes that a record may have.

    Only a store of many segments may have large records. The segments are counted by their token
    shards, since no record has been read yet.
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
    """Return the bytes of a sealed record."""
    return json_text({**value, SEAL: fingerprint(value)})


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Seal a record and write it atomically."""
    write_bytes_atomically(path, record_bytes(value))


def read_record(path: Path, root: Path, expected: dict[str, int] | None = None) -> dict[str, Any]:
    """Return a record that `write_record` wrote.

    Args:
        path: The record's file.
        root: The store; a link that leads out of it is refused.
        expected: Size and checksum if another record pins this one.

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
        # The checksum of a pinned record covers every byte. Other records are compared byte for
        # byte with their only valid text: a seal does not cover spaces or repeated keys.
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
