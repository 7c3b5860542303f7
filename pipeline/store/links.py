"""Refuses links inside a store: writing or removing through them would change other directories.

Readers check the real path of every file. For writers one check of the directory tree is enough,
since nobody else changes it under the store's lock.
"""

import os
from collections.abc import Iterator
from pathlib import Path

from pipeline.errors import IntegrityError

MAX_DEPTH = 50
"""Levels of directories; a store has eight. Python's own walks fail at a thousand."""


def entries_below(root: Path) -> Iterator[os.DirEntry[str]]:
    """Yield every entry below a directory that is not a directory itself, following no links.

    Raises:
        IntegrityError: If directories are nested deeper than in any store.
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
        IntegrityError: If directories are nested deeper than in any store.
    """
    return (Path(entry.path) for entry in entries_below(root) if entry.is_symlink())


def refuse_links(root: Path) -> None:
    """Refuse a store that contains a link; the store's own directory may be one.

    Raises:
        IntegrityError: Naming a link and its target; or if directories are nested too deep.
    """
    for link in links_below(root):
        raise IntegrityError(
            f"{link}: a link to {link.readlink()}, expected none inside a store; remove it, then "
            "run the same command again"
        )
