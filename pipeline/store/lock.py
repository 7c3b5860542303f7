"""One writer a store, by a kernel lock that dies with its process.

The lock file names host and process for the person who waits; the kernel, not the text, decides.
"""

import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from pipeline.errors import ResourceError

logger = logging.getLogger(__name__)


@contextmanager
def writer_lock(path: Path, *, wait: bool = True, what: str = "this store") -> Iterator[None]:
    """Hold a lock for the duration of the block: a store's, or that of a checkpoint directory.

    Raises:
        ResourceError: If another process holds it and `wait` is false, or if the lock's file
            cannot be made.
    """
    file = _locked(path, wait=wait, what=what)
    # The store may have been removed while this process waited, and its lock with it.
    while not _is_current(file, path):
        file.close()
        file = _locked(path, wait=wait, what=what)
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def _locked(path: Path, *, wait: bool, what: str) -> TextIO:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise ResourceError(
            f"{path}: cannot be made ({error.strerror}); free space or fix permissions"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        if not wait:
            file.close()
            raise ResourceError(
                f"{path.parent}: {holder} is writing {what}; wait for it to finish or stop it"
            ) from None
        logger.warning("%s: waiting for %s, which is writing %s", path.parent, holder, what)
        fcntl.flock(file, fcntl.LOCK_EX)
    return file


def _is_current(file: TextIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
