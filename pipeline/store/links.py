"""No link below a store: what writes to it, or removes of it, would reach what lies elsewhere.

Readers look at every file's real place. For those who write, one look at the whole tree is enough:
under the store's lock nobody else changes it.
"""

import os
from pathlib import Path

from pipeline.errors import IntegrityError


def refuse_links(root: Path) -> None:
    """Refuse a store in which there is a link; the store's own directory may be one.

    Raises:
        IntegrityError: Naming the first link, and where it leads.
    """
    with os.scandir(root) as entries:
        for entry in entries:
            if entry.is_symlink():
                raise IntegrityError(
                    f"{entry.path}: a link to {Path(entry.path).readlink()}, expected none inside "
                    "a store; remove it, then run the same command again"
                )
            if entry.is_dir(follow_symlinks=False):
                refuse_links(Path(entry.path))
