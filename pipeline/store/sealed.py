"""The store's JSON records carry a digest of themselves: a flipped bit in one is never believed."""

import json
from pathlib import Path
from typing import Any

from pipeline.errors import IntegrityError
from pipeline.provenance import fingerprint, write_json
from pipeline.store.shards import check_file, read_inside

SEAL = "seal"


def write_record(path: Path, value: dict[str, Any]) -> None:
    """Write a record, sealed, atomically."""
    write_json(path, {**value, SEAL: fingerprint(value)})


def read_record(path: Path, root: Path, expected: dict[str, int] | None = None) -> dict[str, Any]:
    """Return a record that `write_record` wrote.

    Args:
        path: The record's file.
        root: The store; a link that leads out of it is refused.
        expected: Size and checksum where another record pins this one.

    Raises:
        IntegrityError: If it is missing, altered, or not the one that is pinned.
    """
    data = read_inside(path, root) if expected is None else check_file(path, root, expected)
    try:
        value = json.loads(data)
        seal = value.pop(SEAL)
        is_whole = fingerprint(value) == seal
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise IntegrityError(
            f"{path}: not a record of this store ({error!r}); run "
            "`decant capture TEACHER --verify` to rebuild it"
        ) from error
    if not is_whole:
        raise IntegrityError(
            f"{path}: its content does not match its seal; run "
            "`decant capture TEACHER --verify` to rebuild it"
        )
    return value
