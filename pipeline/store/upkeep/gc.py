"""Removes stores, signals and assets so that readers never see an incomplete one.

Everything happens under the store's lock; a store that another process is writing is not removed.
"""

import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, IncompatibleError, IntegrityError
from pipeline.provenance import fsync_directory, refused
from pipeline.store.index import read_index, withdraw
from pipeline.store.layout import Layout
from pipeline.store.links import entries_below, refuse_links
from pipeline.store.lock import writer_lock
from pipeline.store.records import Declaration
from pipeline.store.sealed import read_record, write_record
from pipeline.store.signals import dotted
from pipeline.store.upkeep.contents import assets_of, inside

REMOVED = ".removed-"
"""Prefix of a directory that is being deleted."""


def declarations_of(layout: Layout) -> dict[str, Declaration]:
    """Return the declarations of complete and pending signals, by the name of their directory.

    Raises:
        IntegrityError: If one is altered, so that its signal's assets are unknown.
        IncompatibleError: If this software lacks a form.
    """
    return {
        path.parent.name: Declaration.from_json(read_record(path, layout.root))
        for path in sorted((layout.root / "receipts").glob("*/declaration.json"))
    }


def places_of(layout: Layout, name: str) -> list[Path]:
    """Return the files and directories that belong only to a signal or asset.

    Raises:
        IntegrityError: If one is not inside the store.
    """
    inside(name, layout.root)
    entry = _entry(layout, name)
    if entry is None:
        places = [layout.manifest(name), layout.declaration(name).parent, layout.features / name]
    else:
        file = inside(entry["file"], layout.root)
        places = [layout.asset_records / f"{name}.json", layout.assets / file]
    for path in places:
        if not path.parent.resolve().is_relative_to(layout.root.resolve()):
            raise IntegrityError(
                f"{path.parent}: leads out of the store, expected a directory in it; remove the "
                "link"
            )
    return places


def _entry(layout: Layout, asset: str) -> dict[str, Any] | None:
    return read_index(layout)["assets"].get(asset)


def is_store(path: Path) -> bool:
    """Tell whether a directory is a store, complete or not, or a partly removed one."""
    layout = Layout(path)
    marks = (layout.index, layout.plan, layout.lock)
    is_store = any(mark.is_file() for mark in marks) or path.name.startswith(REMOVED)
    return is_store and path.is_dir() and not path.is_symlink()


def store_bytes(path: Path) -> int:
    """Return the bytes of all files below a directory, without links."""
    return sum(status.st_size for status in _files_below(path))


def freed_bytes(path: Path) -> int:
    """Return the bytes that removing a directory frees.

    A shard that another store shares by a hard link frees nothing.
    """
    return sum(status.st_size for status in _files_below(path) if status.st_nlink == 1)


def _files_below(path: Path) -> Iterator[os.stat_result]:
    for entry in entries_below(path):
        if entry.is_file(follow_symlinks=False):
            yield entry.stat(follow_symlinks=False)


def bytes_of(path: Path) -> int:
    """Return the bytes that removing a file, or all files below a directory, frees."""
    if path.is_dir() and not path.is_symlink():
        return freed_bytes(path)
    return path.lstat().st_size if path.is_file() else 0


def remove_store(path: Path) -> int:
    """Delete a store; return the bytes that this freed.

    The index is removed first, and the directory is renamed before its files are deleted, so that
    readers and new captures never see an incomplete store.

    Raises:
        ConfigError: If `path` is not a store.
        ResourceError: If another process is writing it.
    """
    _check_store(path)
    size = freed_bytes(path)
    layout = Layout(path)
    with writer_lock(layout.lock, wait=False):
        with suppress(IsADirectoryError):
            layout.index.unlink(missing_ok=True)
        fsync_directory(path)
        removed = path.with_name(f"{REMOVED}{os.getpid()}-{uuid.uuid4().hex[:8]}")
        path.rename(removed)
        fsync_directory(path.parent)
        shutil.rmtree(removed)
    return size


def remove_signal(store: Path, name: str) -> int:
    """Delete one signal, complete or not, or one asset; return the bytes that this freed.

    The index entry is removed first, then manifest, receipts and arrays, then the statistics and
    assets that no other signal needs. If this is interrupted, the signal is incomplete, and a
    capture restores it.

    Raises:
        ConfigError: If `store` is not a store.
        IncompatibleError: If it has neither signal nor asset of that name.
        IntegrityError: If the index or a declaration cannot be read, or there is a link in it.
        ResourceError: If another process is writing it, or the file system refuses.
    """
    _check_store(store)
    layout = Layout(store)
    with writer_lock(layout.lock, wait=False):
        refuse_links(store)
        places = places_of(layout, name)
        if not any(path.exists() for path in places):
            there = ", ".join(read_index(layout)["signals"]) or "none"
            raise IncompatibleError(f"{store}: no signal {name}; it has {there}")
        if _entry(layout, name) is not None:
            return _remove_asset(layout, name)
        before = declarations_of(layout)
        size = sum(map(bytes_of, places))
        withdraw(layout, name)
        _, receipts, arrays = places
        for directory in (receipts, arrays):
            _delete(layout, directory)
        _delete_empty_groups(layout, arrays.parent)
        gone = before.pop(dotted(name), None)
        return size + (0 if gone is None else _remove_unused(layout, gone, before))


def _check_store(path: Path) -> None:
    if not is_store(path):
        raise ConfigError(f"{path}: not a store; expected a directory below data/stores")


def _remove_unused(layout: Layout, gone: Declaration, others: Mapping[str, Declaration]) -> int:
    """Delete the statistics and assets that only a removed signal needed."""
    size = 0
    place = (gone.kind, gone.layer)
    if gone.channels is not None and not any(
        other.channels is not None and (other.kind, other.layer) == place
        for other in others.values()
    ):
        statistics = layout.channels(*place)
        size += bytes_of(statistics)
        statistics.unlink(missing_ok=True)
    needed = {asset for other in others.values() for asset in assets_of(other)}
    unused = (assets_of(gone) - needed) & read_index(layout)["assets"].keys()
    return size + sum(_remove_asset(layout, asset) for asset in sorted(unused))


def _remove_asset(layout: Layout, asset: str) -> int:
    places = places_of(layout, asset)
    size = sum(map(bytes_of, places))
    index = read_index(layout)
    del index["assets"][asset]
    write_record(layout.index, index)
    for path in places:
        path.unlink(missing_ok=True)
    return size


def _delete(layout: Layout, directory: Path) -> None:
    """Delete a directory by moving it to `staging` first, so that nobody sees it incomplete."""
    if not directory.is_dir():
        return
    removed = layout.staging / f"{REMOVED}{uuid.uuid4().hex[:8]}"
    try:
        layout.staging.mkdir(exist_ok=True)
        directory.rename(removed)
        fsync_directory(directory.parent)
        shutil.rmtree(removed)
    except OSError as error:
        raise refused(directory, error) from error


def _delete_empty_groups(layout: Layout, group: Path) -> None:
    """Delete the Zarr groups that are empty now."""
    while group.is_relative_to(layout.features) and group != layout.features:
        if not group.is_dir() or any(path.is_dir() for path in group.iterdir()):
            return
        shutil.rmtree(group)
        group = group.parent
