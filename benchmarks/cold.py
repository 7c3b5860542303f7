"""Files out of the page cache, and whether the kernel did as it was asked.

`POSIX_FADV_DONTNEED` is advice: what some process has mapped or not yet written stays, and memory
file systems have nowhere to put it. What lies below the kernel, such as a host's own cache of a
virtual disk, is out of reach.
"""

import ctypes
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)


def drop(files: Iterable[Path]) -> float:
    """Ask the kernel to forget files; return the share of their pages that it still holds."""
    paths = list(files)
    os.sync()
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
    held, pages = (sum(column) for column in zip((0, 0), *map(resident, paths), strict=True))
    return held / max(1, pages)


def resident(path: Path) -> tuple[int, int]:
    """Return how many pages of a file are in memory, and how many it has."""
    size = path.stat().st_size
    if size == 0:
        return 0, 0
    pages = -(-size // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    # A private mapping that could be written to is the kind whose address Python gives away.
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY) as mapped:
        first = ctypes.c_char.from_buffer(mapped)
        address = ctypes.c_void_p(ctypes.addressof(first))
        failed = _LIBC.mincore(address, ctypes.c_size_t(size), found)
        del first
    if failed:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(path))
    return sum(page & 1 for page in found), pages
