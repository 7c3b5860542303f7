"""What looking at a store finds: the state of each part of it, and each damaged file with a reason.

A part is a signal, or what all signals share: the index, the plan with its rows, the assets.
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
"""Names of the parts that are no signals."""


@dataclass(frozen=True)
class Damage:
    """One file that is not what its record states.

    `segment` is the one that has to be captured again for it. `content` is what the file holds when
    it is whole, bytes or a record, where other records of the store tell it. A stray one has no
    record: without it the store is whole.
    """

    file: str
    reason: str
    segment: int | None = None
    content: bytes | dict[str, Any] | None = None
    is_stray: bool = False


@dataclass(frozen=True)
class SignalState:
    """What was found of one part of a store.

    `segments` are those it should have, `whole` how many are there undamaged. `files` are the
    names, within the store, of all files that records of this part state; `bytes` is the size of
    its shards. A signal that is not indexed is pending: readers do not see it.
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
        """Whether readers see the part although something of it is not what it was."""
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
    """Return what an error says of a file, without its name and without the advice at the end."""
    if not path.exists() and not path.is_symlink():
        return "missing"
    said = " ".join(str(error).split()).removeprefix(f"{path}: ")
    return said.rpartition("; ")[0] or said


@dataclass
class Files:
    """Compares the files of one part with what records state, and remembers each that differs."""

    layout: Layout
    progress: Callable[[int], object]
    seen: set[str] = field(default_factory=set)
    stored_bytes: int = 0
    damage: list[Damage] = field(default_factory=list)
    spoiled: set[tuple[str, int | None]] = field(default_factory=set)

    def name(self, path: Path) -> str:
        """Return a path as records have it, relative to the store."""
        return path.relative_to(self.layout.root).as_posix()

    def spoil(
        self,
        path: Path,
        reason: str,
        segment: int | None = None,
        content: bytes | dict[str, Any] | None = None,
    ) -> None:
        """Note that a file is damaged; once a file and segment."""
        name = self.name(path)
        if (name, segment) not in self.spoiled:
            self.spoiled.add((name, segment))
            self.damage.append(Damage(name, reason, segment, content))

    def stray(self, path: Path, reason: str) -> None:
        """Note that a file lies where readers would take it for one of the store."""
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
        """Return a record, or note why it cannot be believed and return None.

        Args:
            path: The record's file.
            pinned: Size and checksum where another record pins it.
            check: Raises `IntegrityError` where its keys or types are not those of such a record.
            segment: The segment it is about.
            content: What it must say, where that is known.
        """
        self.seen.add(self.name(path))
        try:
            found = read_record(path, self.layout.root, pinned)
            if check is not None:
                check(found, path)
        except IntegrityError as error:
            self.spoil(path, reason_of(error, path), segment, content)
            return None
        if content is not None and found != content:
            self.spoil(path, "says other than the manifest or the index", segment, content)
            return None
        return found

    def file(
        self,
        path: Path,
        expected: dict[str, int],
        *,
        segment: int | None = None,
        is_own: bool = True,
    ) -> bool:
        """Tell whether a whole file has the size and the checksum that a record states.

        One that several parts need is the own one of none of them.
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
            # Sizes first: a sparse file of a terabyte would be read for hours.
            if matches(path, root, expected, verify=False):
                found = file_digest(path, root)["xxh3"]
                if found == expected["xxh3"]:
                    return None
                return f"found checksum {found:016x}, expected {expected['xxh3']:016x}"
            # Says which of the many ways of not being that file it is.
            read_inside(path, root, expected["bytes"])
        except IntegrityError as error:
            return reason_of(error, path)
        return "changed while it was read"

    def metadata(self, path: Path, accepted: tuple[bytes, ...]) -> None:
        """Compare a `zarr.json` with what the records imply; the first of `accepted` mends it."""
        self.seen.add(self.name(path))
        try:
            check_metadata(path, self.layout.root, accepted)
        except IntegrityError as error:
            self.spoil(path, reason_of(error, path), content=accepted[0])
