"""Verifies a store: each record by its seal, each listed file by size and xxh3.

As for readers, only what the index lists counts. A signal that is declared but not listed is
pending, and a capture will check it.
"""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from pipeline.errors import ConfigError, IncompatibleError, IntegrityError
from pipeline.provenance import fingerprint
from pipeline.store.codec import group_metadata
from pipeline.store.commit import trusted_receipt
from pipeline.store.layout import FORMAT, Layout
from pipeline.store.links import entries_below
from pipeline.store.reader import StoreReader
from pipeline.store.records import Declaration, Receipt, signal_digest
from pipeline.store.schema import check_index, check_manifest, check_plan
from pipeline.store.sealed import read_record
from pipeline.store.shards import METADATA, ArraySpec, read_shard, shard_name
from pipeline.store.signals import dotted
from pipeline.store.table import check_lengths
from pipeline.store.upkeep.contents import planned_arrays, signal_arrays
from pipeline.store.upkeep.findings import (
    ASSETS,
    INDEX,
    PLAN,
    Damage,
    Files,
    SignalState,
    reason_of,
)
from pipeline.store.upkeep.verify_values import check_rows, check_values

logger = logging.getLogger(__name__)
Progress = Callable[[int], object]
MALFORMED = (AttributeError, IndexError, KeyError, TypeError, ValueError)
"""Errors from reading a sealed record of an unexpected shape."""


def verify_store(
    path: Path, *, deep: bool = False, progress: Progress = lambda count: None
) -> list[SignalState]:
    """Return the state of the index, the plan and its rows, the assets, and of every signal.

    Args:
        path: The store's directory.
        deep: Also decode every shard: content digests, identities of rows, finite values.
        progress: Called with the bytes of each checked file.

    Raises:
        ConfigError: If there is no store at `path`.
        IncompatibleError: If the store has another format, or a form that this software lacks.
    """
    layout = Layout(path)
    if not any(mark.exists() for mark in (layout.index, layout.plan, layout.lock, layout.features)):
        raise ConfigError(f"{path}: not a store; expected a directory below data/stores")
    return _Verification(layout, progress, deep=deep).run()


def unrecorded_files(path: Path, found: list[SignalState]) -> list[str]:
    """Return the files that no record lists, of an unfinished capture or left over."""
    stated = set().union(*(state.files for state in found)) | {Layout(path).lock.name}
    names = {Path(entry.path).relative_to(path).as_posix() for entry in entries_below(path)}
    return sorted(names - stated)


class _Verification:
    """One verification of a store, section by section."""

    def __init__(self, layout: Layout, progress: Progress, *, deep: bool) -> None:
        self.layout = layout
        self.progress = progress
        self.deep = deep
        self.index: dict[str, Any] | None = None
        self.plan: dict[str, Any] | None = None
        self.reader: StoreReader | None = None
        self.readable: set[int] = set()
        self.lengths: tuple[NDArray[Any], NDArray[Any]] | None = None

    def run(self) -> list[SignalState]:
        index = self._check_index()
        plan = self._check_plan(index)
        signals = [self._signal(name) for name in self._claimed(index)]
        states = [self._shared(INDEX, index), self._shared(PLAN, plan)]
        return [*states, self._check_assets(), *signals, *self._pending({s.name for s in signals})]

    def _files(self) -> Files:
        return Files(self.layout, self.progress)

    def _shared(self, name: str, files: Files) -> SignalState:
        there = (self.layout.index if name == INDEX else self.layout.plan).exists()
        return SignalState(
            name,
            "",
            (),
            0,
            0,
            frozenset(files.seen),
            files.stored_bytes,
            there,
            tuple(files.damage),
        )

    def _manifests(self) -> list[Path]:
        return sorted(set(self.layout.manifests.glob("*.json")) - {self.layout.plan})

    def _check_index(self) -> Files:
        files = self._files()
        if not self.layout.index.exists() and not self._manifests():
            return files
        self.index = files.record(self.layout.index, check=self._check_format)
        return files

    def _check_format(self, index: dict[str, Any], path: Path) -> None:
        if index.get("format") != FORMAT:
            raise IncompatibleError(
                f"{self.layout.root}: store format {index.get('format')}, this software reads "
                f"{FORMAT}; capture again with this version"
            )
        check_index(index, path)

    def _check_plan(self, of_index: Files) -> Files:
        files, path = self._files(), self.layout.plan
        if self.index is None and not path.exists() and not self._manifests():
            return files
        plan = self.plan = files.record(path, check=check_plan)
        if plan is None:
            return files
        arrays = planned_arrays(plan)
        segments = {
            f"{self.layout.features.name}/{name}/{shard_name(number, spec.array_type)}": number
            for name, spec in arrays.items()
            if name.startswith("tokens/")
            for number in range(len(plan["segments"]))
        }
        for name, expected in plan["files"].items():
            files.file(self.layout.root / name, expected, segment=segments.get(name))
        self._check_tokenizer(files)
        self._check_metadata(arrays, files)
        self.lengths = self._read_lengths(arrays, plan, files)
        if self.index is not None:
            try:
                read_record(path, self.layout.root, self.index["plan"])
            except IntegrityError:
                of_index.spoil(self.layout.index, f"pins another {path.name} than the one there")
        if self.deep and self.lengths and self.index is not None and not of_index.damage:
            self._open(files)
        return files

    def _open(self, files: Files) -> None:
        """Open the store as readers do, to decode what is not known to be damaged."""
        plan, lost = self.layout.plan, {damage.segment for damage in files.damage}
        if None in lost:
            return
        self.reader = StoreReader(self.layout.root)
        self.readable = set(range(len(self.reader.plan["segments"]))) - lost
        for number, reason in check_rows(self.reader, self.readable):
            # Every file is as the plan lists it, so the plan was made from other rows.
            files.spoil(plan, reason, number)
            self.readable.discard(number)

    def _check_tokenizer(self, files: Files) -> None:
        """Find files next to the tokenizer's, which would be loaded with them."""
        directory = self.layout.assets / "tokenizer"
        # Behind a link nothing is listed: each of its files is found to be outside the store.
        is_there = directory.is_dir() and directory.resolve().is_relative_to(
            self.layout.root.resolve()
        )
        for file in sorted(Path(e.path) for e in entries_below(directory)) if is_there else ():
            if files.name(file) not in files.seen:
                files.seen.add(files.name(file))
                files.stray(file, "not a file of the tokenizer that was captured")

    def _read_lengths(
        self, arrays: dict[str, ArraySpec], plan: dict[str, Any], files: Files
    ) -> tuple[NDArray[Any], NDArray[Any]] | None:
        """Return length and segment of every example, or None if they are damaged."""
        features, root = self.layout.features, self.layout.root
        columns = []
        for name in ("examples/length", "examples/segment"):
            shard = f"{features.name}/{name}/{shard_name(0, arrays[name].array_type)}"
            expected = plan["files"].get(shard)
            try:
                if expected is None:
                    return None
                columns.append(read_shard(features / name, root, arrays[name], 0, expected))
            except IntegrityError as error:
                logger.debug("%s", error)  # reported for the file itself
                return None
        length, segment = columns
        try:
            check_lengths(length, segment, plan, features / "examples")
        except IntegrityError as error:
            # The file is as the plan lists it, so the plan was made from other rows.
            files.spoil(self.layout.plan, reason_of(error, self.layout.plan))
            return None
        return length, segment

    def _check_metadata(self, arrays: dict[str, ArraySpec], files: Files) -> None:
        features = self.layout.features
        groups: dict[Path, None] = {}
        for name, spec in arrays.items():
            array = features / name
            groups |= dict.fromkeys(p for p in array.parents if p.is_relative_to(features))
            files.metadata(array / METADATA, spec.accepted_metadata())
        for group in groups:
            files.metadata(group / METADATA, (group_metadata(),))

    def _check_assets(self) -> SignalState:
        files, layout = self._files(), self.layout
        entries: dict[str, dict[str, Any]] = {} if self.index is None else self.index["assets"]
        if self.index is None:
            for path in sorted(layout.asset_records.glob("*.json")):
                entries[path.stem] = files.record(path) or {}
        for name, entry in entries.items():
            if self.index is not None:
                files.record(layout.asset_records / f"{name}.json", content=entry)
            if entry:
                self._asset(files, entry)
        return SignalState(
            ASSETS,
            "",
            (),
            0,
            0,
            frozenset(files.seen),
            files.stored_bytes,
            True,
            tuple(files.damage),
        )

    def _asset(self, files: Files, entry: dict[str, Any], *, is_own: bool = True) -> None:
        expected = {key: entry[key] for key in ("bytes", "xxh3")}
        files.file(self.layout.assets / entry["file"], expected, is_own=is_own)

    def _claimed(self, of_index: Files) -> Iterator[str]:
        """Yield the signals of the index or, without an index, of the manifests."""
        if self.index is not None:
            yield from sorted(self.index["signals"])
        elif of_index.damage:
            # An index is rebuilt from these.
            yield from (path.stem.replace(".", "/") for path in self._manifests())

    def _signal(self, name: str) -> SignalState:
        files = self._files()
        try:
            return self._claimed_signal(name, files)
        except MALFORMED as error:
            files.spoil(self.layout.manifest(name), f"not a manifest ({error!r})")
            return self._state(name, None, [], files, is_indexed=True)

    def _claimed_signal(self, name: str, files: Files) -> SignalState:
        layout = self.layout
        entry = None if self.index is None else self.index["signals"][name]
        path = layout.manifest(name)
        manifest = files.record(path, entry and entry["manifest"], check=check_manifest)
        if manifest is None:
            return self._without_manifest(name, files)
        declared = Declaration.of_checked(manifest["declaration"])
        receipts = [Receipt.of_checked(value) for value in manifest["receipts"]]
        expected = self._expected(declared.splits, [receipt.segment for receipt in receipts])
        digests = {manifest["digest"], signal_digest(declared, receipts)}
        if (
            declared.name != name
            or digests != {manifest["digest"] if entry is None else entry["digest"]}
            or [receipt.segment for receipt in receipts] != expected
        ):
            files.spoil(path, "not the manifest that the index states")
        files.record(layout.declaration(name), content=manifest["declaration"])
        for value, receipt in zip(manifest["receipts"], receipts, strict=True):
            number = receipt.segment
            files.record(layout.receipt(name, number), segment=number, content=value)
            for shard, digest in receipt.files.items():
                files.file(layout.root / shard, digest, segment=number)
        self._statistics(declared, files)
        self._arrays(declared, files)
        lost = {damage.segment for damage in files.damage}
        if self.deep and self.reader is not None and None not in lost:
            files.damage += check_values(self.reader, name, self.readable & set(expected) - lost)
        return self._state(name, declared, expected, files, is_indexed=True)

    def _expected(self, splits: tuple[str, ...], otherwise: list[int]) -> list[int]:
        if self.plan is None:
            return otherwise
        return [i for i, split in enumerate(self.plan["segments"]) if split in splits]

    def _without_manifest(self, name: str, files: Files) -> SignalState:
        """Check by the receipts, so that a capture repeats no more than necessary."""
        written = files.record(self.layout.declaration(name))
        declared = None if written is None else Declaration.from_json(written)
        expected = [] if declared is None else self._expected(declared.splits, [])
        for number in expected:
            found = files.record(self.layout.receipt(name, number), segment=number)
            for shard, digest in {} if found is None else found["files"].items():
                files.file(self.layout.root / shard, digest, segment=number)
        if declared is not None:
            self._statistics(declared, files)
        return self._state(name, declared, expected, files, is_indexed=True)

    def _statistics(self, declared: Declaration, files: Files) -> None:
        if declared.channels is not None:
            path = self.layout.channels(declared.kind, declared.layer)
            files.file(path, declared.channels, is_own=False)
        for name, entry in declared.asset_entries.items():
            self._asset(files, entry, is_own=False)
            if self.index is not None and self.index["assets"].get(name) != entry:
                path = self.layout.assets / entry["file"]
                files.spoil(path, "not the asset that the index lists")

    def _arrays(self, declared: Declaration, files: Files) -> None:
        if declared.arrays() and self.plan is not None and self.lengths is not None:
            length, segment = self.lengths
            arrays = signal_arrays(declared, self.plan, length=length, segment=segment)
            self._check_metadata(arrays, files)

    def _state(
        self,
        name: str,
        declared: Declaration | None,
        expected: list[int],
        files: Files,
        *,
        is_indexed: bool,
    ) -> SignalState:
        lost = {damage.segment for damage in files.damage} - {None}
        return SignalState(
            name=name,
            form="" if declared is None else declared.form.name,
            splits=() if declared is None else declared.splits,
            segments=len(expected),
            whole=len(set(expected) - lost),
            files=frozenset(files.seen),
            bytes=files.stored_bytes,
            is_indexed=is_indexed,
            damage=tuple(files.damage),
        )

    def _pending(self, claimed: set[str]) -> Iterator[SignalState]:
        """Yield the signals that are declared but not listed, with what a capture would keep."""
        layout = self.layout
        skip = {dotted(name) for name in claimed} | {layout.asset_records.name}
        for directory in sorted(layout.asset_records.parent.glob("*")):
            if directory.name in skip or not directory.is_dir():
                continue
            name, files = directory.name.replace(".", "/"), self._files()
            files.seen |= {files.name(path) for path in directory.iterdir()}
            declared, expected, whole = None, [], 0
            try:
                written = read_record(layout.declaration(name), layout.root)
                declared = Declaration.from_json(written)
                expected = self._expected(declared.splits, [])
                for number in expected:
                    receipt = trusted_receipt(layout, name, number, verify=True)
                    if receipt is not None and receipt.declaration == fingerprint(written):
                        whole += 1
                        files.seen |= set(receipt.files)
                        files.stored_bytes += sum(file["bytes"] for file in receipt.files.values())
            except (IntegrityError, IncompatibleError, *MALFORMED) as error:
                logger.debug("%s: %s", name, reason_of(error, layout.declaration(name)))
            state = self._state(name, declared, expected, files, is_indexed=False)
            yield SignalState(**{**vars(state), "whole": whole})


def damage_of(found: list[SignalState]) -> list[Damage]:
    """Return all damage, each file once, in the order of the sections."""
    return list({damage.file: damage for state in found for damage in state.damage}.values())
