"""Copies a store, or some of its signals, to another disk. Readers never see an incomplete copy.

The target is written in this order: planned files, assets and statistics, shards; metadata;
declarations and receipts; plan and manifests; the index last. Until then readers find no store in a
new target, and only the earlier signals in an existing one. After an interruption, files with the
right size and checksum are kept.
"""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, IncompatibleError, IntegrityError, ResourceError
from pipeline.provenance import fingerprint, fsync_directory, write_bytes_atomically
from pipeline.store.codec import group_metadata
from pipeline.store.index import ensure_index, read_index, withdraw
from pipeline.store.layout import Layout
from pipeline.store.links import refuse_links
from pipeline.store.lock import writer_lock
from pipeline.store.reader import StoreReader
from pipeline.store.records import of_manifest
from pipeline.store.schema import check_plan
from pipeline.store.sealed import read_record, write_record
from pipeline.store.shards import METADATA, check_file, check_metadata, create_array, matches
from pipeline.store.upkeep.contents import (
    asset_file,
    assets_of,
    find_signal,
    inside,
    planned_arrays,
    signal_arrays,
    signal_files,
    with_needed,
)


def target_of(source: Path, target: Path) -> Path:
    """Return the directory of a copy of `source`: `target`, or a directory in it.

    Raises:
        ConfigError: If it is a file, the source, or inside the source.
        IncompatibleError: If `target` is itself a store of another name.
    """
    name = source.resolve().name
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target}: is a file; expected a directory of stores")
    root = target if target.resolve().name == name else target / name
    if root.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{root}: is the store {source} or in it; give another directory")
    layout = Layout(target)
    if root != target and any(path.exists() for path in (layout.index, layout.plan)):
        raise IncompatibleError(
            f"{target}: is a store, expected a directory of stores or a path that ends in {name}; "
            f"give {target.parent}"
        )
    return root


def check_union(
    layout: Layout, reader: StoreReader, signals: Sequence[str], assets: Sequence[str]
) -> list[str]:
    """Check that signals and assets of `reader` can be added to the store at `layout`.

    Returns:
        The existing signals with equal values in different bytes; they must be withdrawn while
        their files are replaced.

    Raises:
        IncompatibleError: If the target has another plan, or another signal or asset of the same
            name.
    """
    try:
        plan = read_record(layout.plan, layout.root)
        check_plan(plan, layout.plan)
    except IntegrityError:
        plan = None  # missing or altered: without a plan there is no store
    if plan is not None and plan != reader.plan:
        raise IncompatibleError(
            f"{layout.root}: has the plan of {_of(plan)}, expected that of {_of(reader.plan)}, as "
            f"in {reader.layout.root}; give another directory"
        )
    try:
        index = read_index(layout)
    except IntegrityError:
        return []  # rebuilt from the manifests at the end of the copy
    renewed = []
    for name in signals:
        found, mine = index["signals"].get(name), reader.index["signals"][name]
        if found and found["digest"] != mine["digest"]:
            raise IncompatibleError(
                f"{layout.root}: {name} has digest {found['digest'][:16]} there, "
                f"{mine['digest'][:16]} in {reader.layout.root}; copy to another directory, or "
                "leave the signal out"
            )
        if found and found["manifest"] != mine["manifest"]:
            renewed.append(name)
    for asset in assets:
        found, mine = index["assets"].get(asset), reader.index["assets"][asset]
        if found and found != mine:
            raise IncompatibleError(
                f"{layout.root}: has another asset {asset} ({found['xxh3']:016x}), expected "
                f"{mine['xxh3']:016x}, as in {reader.layout.root}; copy to another directory"
            )
    _check_statistics(layout, index, reader, signals)
    return renewed


def _check_statistics(
    layout: Layout, index: dict[str, Any], reader: StoreReader, signals: Sequence[str]
) -> None:
    """Check the statistics of layers: all forms of a layer share one file."""
    declared = [reader.signal(name).declaration for name in signals]
    mine = {(one.kind, one.layer): one.channels for one in declared if one.channels}
    for name, entry in index["signals"].items():
        try:
            path = layout.manifest(name)
            other, _ = of_manifest(read_record(path, layout.root, entry["manifest"]), path)
        except IntegrityError:
            continue  # readers refuse it anyway
        place = (other.kind, other.layer)
        if other.channels and place in mine and other.channels != mine[place]:
            raise IncompatibleError(
                f"{layout.root}: {name} was standardised with statistics "
                f"{other.channels['xxh3']:016x}, those in {reader.layout.root} are "
                f"{mine[place]['xxh3']:016x}; copy to another directory"
            )


def _of(plan: dict[str, Any]) -> str:
    """Describe a plan in a few words."""
    spec = plan.get("spec", {})
    weights = str(spec.get("teacher", {}).get("weights_sha256", "unknown"))[:12]
    tokens = str(spec.get("tokens", "unknown"))[:12]
    return f"{plan.get('examples', 0):,} examples (tokens {tokens}, teacher {weights})"


RESERVE_BYTES = 16 * 2**20
"""Bytes for metadata, records and directories, which are not counted individually."""


def copy_store(
    source: Path,
    target: Path,
    *,
    signals: Sequence[str] | None = None,
    progress: Callable[[int], object] = lambda _: None,
) -> Path:
    """Copy a store, as `StoreCopy` does, which also reports what is copied.

    Returns:
        The copy's directory.
    """
    return StoreCopy(source, target, signals=signals).run(progress)


class StoreCopy:
    """One copy of a store.

    Only signals that the source's index lists at construction are copied, so a capture may write to
    the source meanwhile. Each file is checked at the source, written atomically and durably, read
    again and compared. Where the system has `posix_fadvise`, cached pages are dropped first, so
    that the disk is read and not memory; caches of disks and file servers remain.

    Attributes:
        root: The copy's directory.
        signals: The signals to copy.
        bytes: Bytes of their files, of planned files, and of plan and manifests.
        copied_bytes: Bytes of these that `run` wrote.
        kept: The number of files that `run` found in the target already.
    """

    def __init__(self, source: Path, target: Path, *, signals: Sequence[str] | None = None) -> None:
        """Read the source's records; nothing is written yet.

        Args:
            source: The store.
            target: A directory of stores, or the copy itself if it ends in the source's name.
            signals: Names or unique beginnings of names; signals that they need are added. None for
                all signals.

        Raises:
            IntegrityError: If the source is not a complete store.
            ConfigError: If the target is inside the source.
            IncompatibleError: If a signal does not exist, none is complete, or `target` is another
                store.
        """
        self._reader = StoreReader(source)
        self.root = target_of(source, target)
        self._layout = Layout(self.root)
        reader = self._reader
        names = reader.signals
        if signals is not None:
            names = with_needed(reader, [find_signal(reader.signals, name) for name in signals])
        if not names:
            raise IncompatibleError(
                f"{source}: none of its signals is complete yet, so there is nothing to copy; "
                "finish its capture first"
            )
        self.signals = [inside(name, source) for name in names]
        declared = [reader.signal(name).declaration for name in names]
        indexed = set(reader.index["assets"])
        needed = {asset for declaration in declared for asset in assets_of(declaration)}
        self._assets = sorted(indexed if signals is None else indexed & needed)
        self._files = {inside(name, source): entry for name, entry in reader.plan["files"].items()}
        self._files |= dict(asset_file(reader, asset) for asset in self._assets)
        for name in names:
            self._files |= signal_files(reader, name)
        pinned = {reader.layout.plan: reader.index["plan"]}
        pinned |= {
            reader.layout.manifest(name): reader.index["signals"][name]["manifest"]
            for name in names
        }
        self._pinned = {str(path.relative_to(source)): entry for path, entry in pinned.items()}
        every = self._files | self._pinned
        self.bytes = sum(entry["bytes"] for entry in every.values())
        self.copied_bytes = 0
        self.kept = 0

    def run(self, progress: Callable[[int], object] = lambda _: None) -> Path:
        """Copy missing files, under the lock of the target.

        Args:
            progress: Called with the bytes of each file when it is complete in the target.

        Raises:
            IntegrityError: If a file of the source is damaged, a file reads back differently, or
                the target contains a link.
            IncompatibleError: If the target has another plan, or another signal or asset of the
                same name.
            ResourceError: If the target has no room or refuses.
        """
        reader = self._reader
        with writer_lock(self._layout.lock, what="this copy"):
            refuse_links(self.root)
            shutil.rmtree(self._layout.staging, ignore_errors=True)
            for name in check_union(self._layout, reader, self.signals, self._assets):
                withdraw(self._layout, name)
            self._check_space()
            self._copy_all(self._files, progress)
            self._metadata()
            self._sync(self._layout.features, self._layout.assets)
            for name in self.signals:
                self._receipts(name)
            self._publish(progress)
            shutil.rmtree(self._layout.staging, ignore_errors=True)
        return self.root

    def _check_space(self) -> None:
        root = self.root
        missing = [
            entry["bytes"]
            for name, entry in self._files.items()
            if not matches(root / name, root, entry, verify=False)
        ]
        free = shutil.disk_usage(root).free
        needed = sum(missing) + RESERVE_BYTES
        if missing and needed > free:
            raise ResourceError(
                f"{root}: needs {needed:,} bytes, {free:,} are free; free space or copy fewer "
                "signals, then run the same command again: what is there is kept"
            )

    def _copy_all(
        self, files: dict[str, dict[str, int]], progress: Callable[[int], object]
    ) -> None:
        for name, entry in files.items():
            self._copy(name, entry)
            progress(entry["bytes"])

    def _copy(self, name: str, entry: dict[str, int]) -> None:
        path = self.root / name
        if path.exists() and _reads_back(path, self.root, entry):
            self.kept += 1
            return
        data = check_file(self._reader.layout.root / name, self._reader.layout.root, entry)
        write_bytes_atomically(path, data, aside=self._layout.staging)
        if not _reads_back(path, self.root, entry):
            path.unlink(missing_ok=True)
            raise IntegrityError(
                f"{path}: reads back otherwise than it was written, so this disk is not to be "
                "trusted; copy to another one"
            )
        self.copied_bytes += len(data)

    def _metadata(self) -> None:
        reader, source = self._reader, self._reader.layout
        arrays = planned_arrays(reader.plan)
        length, segment = reader.examples["length"], reader.examples["segment"]
        for name in self.signals:
            declared = reader.signal(name).declaration
            arrays |= signal_arrays(declared, reader.plan, length=length, segment=segment)
        for name, spec in arrays.items():
            array = source.features / name
            groups = [parent for parent in array.parents if parent.is_relative_to(source.features)]
            check_metadata(array / METADATA, source.root, spec.accepted_metadata())
            for group in groups:
                check_metadata(group / METADATA, source.root, (group_metadata(),))
            create_array(self._layout.features, name, spec)

    def _receipts(self, name: str) -> None:
        """Write declaration and receipts from the manifest, which contains them."""
        stored = self._reader.signal(name)
        self._record(self._layout.declaration(name), stored.declaration.to_json())
        for segment, receipt in stored.receipts.items():
            self._record(self._layout.receipt(name, segment), asdict(receipt))

    def _record(self, path: Path, value: dict[str, Any]) -> None:
        try:
            # Compared as fingerprints, since JSON has no tuples.
            if fingerprint(read_record(path, self.root)) == fingerprint(value):
                return
        except IntegrityError:
            pass
        write_record(path, value)

    def _sync(self, *folders: Path) -> None:
        """Make every directory durable whose files the next records will list.

        An earlier copy may have been killed before this step.
        """
        device = self.root.stat().st_dev
        above = [self.root, *self.root.absolute().parents]
        directories = {folder for folder in above if folder.stat().st_dev == device}
        for folder in folders:
            directories |= {Path(found) for found, _, _ in os.walk(folder)}
        for directory in directories:
            try:
                fsync_directory(directory)
            except PermissionError:
                if directory.is_relative_to(self.root):
                    raise  # any other existed before and may belong to another user

    def _publish(self, progress: Callable[[int], object]) -> None:
        target, index = self._layout, self._reader.index
        self._copy_all(self._pinned, progress)
        for asset in self._assets:
            record = index["assets"][asset]
            self._record(target.asset_records / f"{asset}.json", record)
        self._sync(target.manifests, target.asset_records.parent)
        ensure_index(target)
        found = read_index(target)
        wanted = {
            **found,
            "signals": found["signals"] | {name: index["signals"][name] for name in self.signals},
            "assets": found["assets"] | {name: index["assets"][name] for name in self._assets},
        }
        if wanted != found:
            write_record(target.index, wanted)


def _reads_back(path: Path, root: Path, entry: dict[str, int]) -> bool:
    """Sync a file and tell whether it reads back as expected, from the disk where possible."""
    if not matches(path, root, entry, verify=False):
        return False
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)
    return matches(path, root, entry, verify=True)
