"""What a disk holds after a power cut: a model of a file system that keeps only what was synced.

While a writer works in a real directory, `Recorder` notes every operation of its that a file system
could lose. `Tree` replays any first part of them and says what would be left: as POSIX promises it,
and no more. The content of a file is what it was at its last `fsync`; a name is what it was at the
last `fsync` of its directory, renamed or deleted or not; a directory that nobody synced in its
parent is gone with all that is in it. What was not synced may have reached the disk all the same,
in any order, files cut off: an adversary may choose.
"""

import os
import random
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import pytest

Choice = TypeVar("Choice")
Choose: TypeAlias = Callable[[Sequence[Any]], Any]
"""Picks what survived, of what may have; the first is what surely did."""


@dataclass(frozen=True)
class Event:
    """One operation: what it does, to which path below the base, and its content or new name."""

    kind: str
    path: str
    content: bytes = b""
    to: str = ""


@dataclass
class File:
    """Content that was synced (None: never), and content as every process sees it."""

    synced: bytes | None = None
    now: bytes = b""

    def survivors(self) -> list[bytes]:
        synced = self.synced or b""
        if self.now == synced:
            return [synced]
        return [synced, b"", self.now[: len(self.now) // 2], self.now]


@dataclass
class Directory:
    """Names that are durable, names as every process sees them, and what they were between."""

    durable: dict[str, "Node"] = field(default_factory=dict)
    now: dict[str, "Node"] = field(default_factory=dict)
    between: dict[str, list["Node | None"]] = field(default_factory=dict)

    def put(self, name: str, node: "Node | None") -> None:
        self.between.setdefault(name, []).append(node)
        if node is None:
            del self.now[name]
        else:
            self.now[name] = node

    def sync(self) -> None:
        self.durable = dict(self.now)
        self.between.clear()

    def survivors(self, name: str) -> list["Node | None"]:
        return [self.durable.get(name), *self.between.get(name, ())]


Node: TypeAlias = File | Directory


def surely(candidates: Sequence[Choice]) -> Choice:
    """Keep only what POSIX promises."""
    return candidates[0]


def adversary(seed: int) -> Choose:
    """Keep anything that may have reached the disk; a function of the seed."""
    return random.Random(seed).choice


class Tree:
    """The files below one directory, as they are and as a power cut would leave them."""

    def __init__(self) -> None:
        self.base = Directory()

    def _at(self, path: str) -> Node:
        node: Node = self.base
        for name in Path(path).parts:
            assert isinstance(node, Directory)
            node = node.now[name]
        return node

    def _directory(self, path: str) -> Directory:
        node = self._at(path)
        assert isinstance(node, Directory)
        return node

    def _above(self, path: str) -> tuple[Directory, str]:
        return self._directory(str(Path(path).parent)), Path(path).name

    def apply(self, event: Event) -> None:
        """Replay one operation."""
        match event.kind:
            case "mkdir" | "create":
                parent, name = self._above(event.path)
                parent.put(name, Directory() if event.kind == "mkdir" else File())
            case "unlink" | "rmdir":
                parent, name = self._above(event.path)
                parent.put(name, None)
            case "rename":
                node = self._at(event.path)
                if isinstance(node, File):
                    node.now = event.content
                parent, name = self._above(event.path)
                parent.put(name, None)
                parent, name = self._above(event.to)
                parent.put(name, node)
            case "sync":
                node = self._at(event.path)
                if isinstance(node, File):
                    node.synced = node.now = event.content
                else:
                    node.sync()

    def write(self, target: Path) -> None:
        """Write out what every process sees: the disk of a machine that goes on."""
        _write(self.base, target, lambda directory, name: directory.now.get(name), lambda f: f.now)

    def cut_power(self, target: Path, choose: Choose = surely) -> None:
        """Write out what is left after a power cut."""
        _write(
            self.base,
            target,
            lambda directory, name: choose(directory.survivors(name)),
            lambda file: choose(file.survivors()),
        )

    def durable(self) -> list[tuple[str, bytes | None]]:
        """Return what surely survives, to compare."""

        def walk(directory: Directory, prefix: str) -> Iterator[tuple[str, bytes | None]]:
            for name, node in sorted(directory.durable.items()):
                if isinstance(node, File):
                    yield f"{prefix}{name}", node.synced
                else:
                    yield f"{prefix}{name}/", None
                    yield from walk(node, f"{prefix}{name}/")

        return list(walk(self.base, ""))


def _write(
    directory: Directory,
    target: Path,
    entry: Callable[[Directory, str], Node | None],
    content: Callable[[File], bytes],
) -> None:
    target.mkdir(exist_ok=True)
    for name in sorted({*directory.durable, *directory.now, *directory.between}):
        node = entry(directory, name)
        if isinstance(node, File):
            (target / name).write_bytes(content(node))
        elif node is not None:
            _write(node, target / name, entry, content)


class Recorder:
    """Notes what this process does to files below `base`; `mark` notes what it says it did."""

    def __init__(self, base: Path) -> None:
        self.events: list[Event] = []
        self._base = base.resolve()

    def mark(self, text: str) -> None:
        self.events.append(Event("mark", text))

    def _inside(self, path: Any, dir_fd: int | None = None) -> str | None:
        """Return a path below the base, or None if it is elsewhere."""
        if isinstance(path, int):
            full = Path(f"/proc/self/fd/{path}").readlink()
        else:
            above = Path.cwd() if dir_fd is None else Path(f"/proc/self/fd/{dir_fd}").readlink()
            full = above / os.fsdecode(path)
        return str(full.relative_to(self._base)) if full.is_relative_to(self._base) else None

    @contextmanager
    def recording(self) -> Iterator["Recorder"]:
        """Watch the block; nothing in it is really synced, so it is fast."""
        plain = {name: getattr(os, name) for name in ("open", "replace", "rename", "mkdir")}
        plain |= {name: getattr(os, name) for name in ("unlink", "remove", "rmdir")}

        def opened(path, flags, mode=0o777, *, dir_fd=None):
            inside = self._inside(path, dir_fd) if flags & os.O_CREAT else None
            is_new = inside is not None and not (self._base / inside).exists()
            descriptor = plain["open"](path, flags, mode, dir_fd=dir_fd)
            if is_new:
                self.events.append(Event("create", inside))
            return descriptor

        def synced(descriptor):
            inside = self._inside(descriptor)
            if inside is not None:
                is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
                content = (self._base / inside).read_bytes() if is_file else b""
                self.events.append(Event("sync", inside, content))

        def renamed(source, target, *, src_dir_fd=None, dst_dir_fd=None):
            one, other = self._inside(source, src_dir_fd), self._inside(target, dst_dir_fd)
            plain["replace"](source, target, src_dir_fd=src_dir_fd, dst_dir_fd=dst_dir_fd)
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                place = self._base / other
                content = place.read_bytes() if place.is_file() else b""
                self.events.append(Event("rename", one, content, other))

        def made(path, mode=0o777, *, dir_fd=None):
            plain["mkdir"](path, mode, dir_fd=dir_fd)
            if (inside := self._inside(path, dir_fd)) is not None:
                self.events.append(Event("mkdir", inside))

        def gone(kind):
            def function(path, *, dir_fd=None):
                inside = self._inside(path, dir_fd)
                plain[kind](path, dir_fd=dir_fd)
                if inside is not None:
                    self.events.append(Event(kind, inside))

            return function

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "open", opened)
            patch.setattr(os, "fsync", synced)
            patch.setattr(os, "replace", renamed)
            patch.setattr(os, "rename", renamed)
            patch.setattr(os, "mkdir", made)
            patch.setattr(os, "unlink", gone("unlink"))
            patch.setattr(os, "remove", gone("unlink"))
            patch.setattr(os, "rmdir", gone("rmdir"))
            yield self
