"""No link below a store: what writes to it, or removes of it, would reach what lies elsewhere.

Readers look at every file's real place. For those who write, one look at the whole tree is enough:
under the store's lock nobody else changes it.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import IntegrityError

MAX_DEPTH = 50
"""Directories in each other; a store has eight. Python's own walks end at a thousand, badly."""


def entries_below(root: Path) -> Iterator[os.DirEntry[str]]:
    """Yield all that lies below a directory and is no directory itself; no link is followed.

    Raises:
        IntegrityError: If directories are nested deeper than those of any store.
    """
    waiting = [(root, 0)]
    while waiting:
        directory, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise IntegrityError(
                f"{str(directory)[:200]}: nested {depth} directories deep, expected at most "
                f"{MAX_DEPTH} in a store; remove it, then run the same command again"
            )
        with os.scandir(directory) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    waiting.append((Path(entry.path), depth + 1))
                else:
                    yield entry


def links_below(root: Path) -> Iterator[Path]:
    """Yield every link below a directory.

    Raises:
        IntegrityError: If directories are nested deeper than those of any store.
    """
    return (Path(entry.path) for entry in entries_below(root) if entry.is_symlink())


def refuse_links(root: Path) -> None:
    """Refuse a store in which there is a link; the store's own directory may be one.

    Raises:
        IntegrityError: Naming a link, and where it leads; or if directories are nested too deep.
    """
    for link in links_below(root):
        raise IntegrityError(
            f"{link}: a link to {link.readlink()}, expected none inside a store; remove it, then "
            "run the same command again"
        )
