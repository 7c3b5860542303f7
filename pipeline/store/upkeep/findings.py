"""The findings of a verification: the state of each section of a store, and its damaged files.

A section is a signal, or something that all signals share: the index, the plan with its rows, the
assets.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import IntegrityError
from pipeline.store.layout import Layout
from pipeline.store.sealed import read_record
from pipeline.store.shards import check_metadata, file_digest, matches, read_inside

INDEX, PLAN, ASSETS = "index", "plan and rows", "assets"
"""Names of the sections that are not signals."""


@dataclass(frozen=True)
class Damage:
    """One file that differs from its record.

    Attributes:
        file: The file's path in the store.
        reason: What is wrong with it.
        segment: The segment that must be captured again; None if no single segment.
        content: The file's right content, bytes or a record, if other records imply it.
        is_stray: Whether no record lists the file, so that removing it is enough.
    """

    file: str
    reason: str
    segment: int | None = None
    content: bytes | dict[str, Any] | None = None
    is_stray: bool = False


@dataclass(frozen=True)
class SignalState:
    """The state of one section of a store.

    Attributes:
        name: The signal's name, or that of another section.
        form: The signal's form.
        splits: The splits that have the signal.
        segments: The number of segments that it should have.
        whole: The number of its intact segments.
        files: Paths in the store of all files that its records list.
        bytes: The size of its shards.
        is_indexed: Whether readers see it; if not, it is pending.
        damage: Its damaged files.
    """

    name: str
    form: str
    splits: tuple[str, ...]
    segments: int
    whole: int
    files: frozenset[str]
    bytes: int
    is_indexed: bool
    damage: tuple[Damage, ...]

    @property
    def is_damaged(self) -> bool:
        """Whether a file of the section is damaged."""
        return bool(self.damage)

    @property
    def state(self) -> str:
        """The state in words."""
        if self.damage:
            lost = self.segments - self.whole
            count = f"{lost} of {self.segments} segments" if lost else _files(len(self.damage))
            return f"damaged: {count}"
        if not self.is_indexed:
            return f"pending: {self.whole} of {self.segments}" if self.segments else "pending"
        return "whole"


def _files(count: int) -> str:
    return f"{count} file{'s' if count > 1 else ''}"


def reason_of(error: Exception, path: Path) -> str:
    """Return an error's reason, without the file's name and the advice at the end."""
    if not path.exists() and not path.is_symlink():
        return "missing"
    message = " ".join(str(error).split()).removeprefix(f"{path}: ")
    return message.rpartition("; ")[0] or message


@dataclass
class Files:
    """Compares the files of one section with its records, and collects those that differ."""

    layout: Layout
    progress: Callable[[int], object]
    seen: set[str] = field(default_factory=set)
    stored_bytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    spoiled: set[tuple[str, int | None]] = field(default_factory=set)

    def name(self, path: Path) -> str:
        """Return a path relative to the store, as in records."""
        return path.relative_to(self.layout.root).as_posix()

    def spoil(
        self,
        path: Path,
        reason: str,
        segment: int | None = None,
        content: bytes | dict[str, Any] | None = None,
    ) -> None:
        """Note that a file is damaged, once for each file and segment."""
        name = self.name(path)
        if (name, segment) not in self.spoiled:
            self.spoiled.add((name, segment))
            self.damage.append(Damage(name, reason, segment, content))

    def stray(self, path: Path, reason: str) -> None:
        """Note an unlisted file that readers would take for one of the store."""
        self.damage.append(Damage(self.name(path), reason, is_stray=True))

    def record(
        self,
        path: Path,
        pinned: dict[str, int] | None = None,
        *,
        check: Callable[[dict[str, Any], Path], None] | None = None,
        segment: int | None = None,
        content: dict[str, Any] | None = None,
    ) -> dict[str, Any] | None:
        """Return a record; if it is damaged, note why and return None.

        Args:
            path: The record's file.
            pinned: Size and checksum if another record pins it.
            check: Raises `IntegrityError` if its keys or types are wrong.
            segment: Its segment.
            content: Its right content, if that is known.
        """
        self.seen.add(self.name(path))
        try:
            record = read_record(path, self.layout.root, pinned)
            if check is not None:
                check(record, path)
        except IntegrityError as error:
            self.spoil(path, reason_of(error, path), segment, content)
            return None
        if content is not None and record != content:
            self.spoil(path, "says other than the manifest or the index", segment, content)
            return None
        return record

    def file(
        self,
        path: Path,
        expected: dict[str, int],
        *,
        segment: int | None = None,
        is_own: bool = True,
    ) -> bool:
        """Tell whether a file has the size and the checksum that a record states.

        Args:
            path: The file.
            expected: Its size and checksum.
            segment: Its segment.
            is_own: Whether only this section uses the file.
        """
        self.seen.add(self.name(path))
        self.stored_bytes += expected["bytes"] if is_own else 0
        reason = self._difference(path, expected)
        self.progress(expected["bytes"])
        if reason is not None:
            self.spoil(path, reason, segment)
        return reason is None

    def _difference(self, path: Path, expected: dict[str, int]) -> str | None:
        root = self.layout.root
        try:
            # Sizes first: reading a sparse file of a terabyte would take hours.
            if matches(path, root, expected, verify=False):
                found = file_digest(path, root)["xxh3"]
                if found == expected["xxh3"]:
                    return None
                return f"found checksum {found:016x}, expected {expected['xxh3']:016x}"
            # Raises an error that says what is wrong.
            read_inside(path, root, expected["bytes"])
        except IntegrityError as error:
            return reason_of(error, path)
        return "changed while it was read"

    def metadata(self, path: Path, accepted: tuple[bytes, ...]) -> None:
        """Compare a `zarr.json` with the accepted ones, of which the first repairs it."""
        self.seen.add(self.name(path))
        try:
            check_metadata(path, self.layout.root, accepted)
        except IntegrityError as error:
            self.spoil(path, reason_of(error, path), content=accepted[0])
