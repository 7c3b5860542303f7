"""Which stores are not needed any more, and their removal: each teacher and plan has its own.

A store is needed if a manifest under `data/manifests` names it. One that is being captured for the
first time is named by none yet, but its lock is held, so it is not removed.
"""

import os
import shutil
import uuid
from pathlib import Path

from pipeline.errors import ConfigError, IntegrityError
from pipeline.provenance import fsync_directory, read_json
from pipeline.store.layout import Layout
from pipeline.store.lock import writer_lock

REMOVED = ".removed-"
"""Prefix of a directory that is being deleted."""


def unreferenced_stores(stores: Path, manifests: Path) -> list[Path]:
    """Return the stores that no manifest names, and what is left of removals that were cut short.

    Args:
        stores: Directory of stores, `data/stores`.
        manifests: Directory of the manifests of all teachers, `data/manifests`.

    Raises:
        IntegrityError: If a manifest cannot be read: the store it names would look unneeded.
    """
    if not stores.is_dir():
        return []
    needed = set()
    for path in sorted(manifests.glob("*/*.json")):
        try:
            needed.add(read_json(path)["store"])
        except (KeyError, TypeError) as error:
            raise IntegrityError(
                f"{path}: names no store; run the capture stage of this teacher first"
            ) from error
    return sorted(path for path in stores.iterdir() if _is_store(path) and path.name not in needed)


def _is_store(path: Path) -> bool:
    layout = Layout(path)
    marks = (layout.index, layout.plan, layout.lock)
    is_store = any(mark.is_file() for mark in marks) or path.name.startswith(REMOVED)
    return is_store and path.is_dir() and not path.is_symlink()


def store_bytes(path: Path) -> int:
    """Return the bytes of all files below a directory; links count as nothing."""
    return sum(
        file.lstat().st_size for file in path.rglob("*") if file.is_file() and not file.is_symlink()
    )


def remove_store(path: Path) -> int:
    """Delete a store; return the bytes that its files had.

    The index goes first and the directory is renamed before anything in it is deleted, so a reader
    or a new capture never sees half a store.

    Raises:
        ConfigError: If `path` is no store.
        ResourceError: If another process is writing it.
    """
    if not _is_store(path):
        raise ConfigError(f"{path}: not a store; expected a directory below data/stores")
    size = store_bytes(path)
    layout = Layout(path)
    with writer_lock(layout.lock, wait=False):
        layout.index.unlink(missing_ok=True)
        fsync_directory(path)
        removed = path.with_name(f"{REMOVED}{os.getpid()}-{uuid.uuid4().hex[:8]}")
        path.rename(removed)
        fsync_directory(path.parent)
        shutil.rmtree(removed)
    return size
