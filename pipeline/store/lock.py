"""Allows one writer per store, by a kernel lock that is released when its process ends.

The lock file names host and process of the holder for the user who waits. Only the kernel's lock
counts, not the text.
"""

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from pipeline.errors import IntegrityError, ResourceError
from pipeline.provenance import make_directory

logger = logging.getLogger(__name__)
MAX_NAME = 300
"""Characters of the holder's name that are read from a lock file."""


@contextmanager
def writer_lock(path: Path, *, wait: bool = True, what: str = "this store") -> Iterator[None]:
    """Hold the lock of a store or checkpoint directory for the duration of the block.

    Raises:
        ResourceError: If another process holds it and `wait` is false, or if the lock file cannot
            be created.
        IntegrityError: If the lock file is a link, a pipe or a directory.
    """
    file = _locked(path, wait=wait, what=what)
    # While this process waited, the store may have been removed, and its lock file with it.
    while not _is_current(file, path):
        file.close()
        file = _locked(path, wait=wait, what=what)
    with file:
        # The name is optional: a full disk must not prevent locking.
        with suppress(OSError):
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def holder_of(path: Path) -> str | None:
    """Return the holder of a lock in words; None if it is free or not a regular file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        opened = os.fdopen(descriptor, errors="replace")
    except OSError:  # a directory, whose descriptor may already be closed
        with contextlib.suppress(OSError):
            os.close(descriptor)
        return None
    with opened as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read(MAX_NAME).strip() or "another process"
        except OSError:
            return None
    return None


def _locked(path: Path, *, wait: bool, what: str) -> TextIO:
    try:
        make_directory(path.parent)
        # A link may lead out of a store that came from elsewhere, and opening a pipe would block.
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.fdopen(os.open(path, flags, 0o666), "a+")
    except OSError as error:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            raise IntegrityError(
                f"{path}: is no plain file, as a lock is; remove it, then run the same command "
                "again"
            ) from error
        raise ResourceError(
            f"{path}: cannot be made ({error.strerror}); free space or fix permissions"
        ) from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read(MAX_NAME).strip() or "another process"
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
