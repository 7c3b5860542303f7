"""One writer a store, by a kernel lock that dies with its process.

The lock file names host and process for the person who waits; the kernel, not the text, decides.
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
"""Characters of what the lock file may say of its holder."""


@contextmanager
def writer_lock(path: Path, *, wait: bool = True, what: str = "this store") -> Iterator[None]:
    """Hold a lock for the duration of the block: a store's, or that of a checkpoint directory.

    Raises:
        ResourceError: If another process holds it and `wait` is false, or if the lock's file
            cannot be made.
        IntegrityError: If a link, a pipe or a directory is in its place.
    """
    file = _locked(path, wait=wait, what=what)
    # The store may have been removed while this process waited, and its lock with it.
    while not _is_current(file, path):
        file.close()
        file = _locked(path, wait=wait, what=what)
    with file:
        # The name is a courtesy: a full disk keeps nobody from the lock.
        with suppress(OSError):
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


def holder_of(path: Path) -> str | None:
    """Return who holds a lock, in words; None if nobody does, or it is no plain file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        opened = os.fdopen(descriptor, errors="replace")
    except OSError:  # a directory, whose descriptor is closed already or is closed here
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
        # Never through a link, which may lead out of a store that came from elsewhere; and a pipe
        # in its place must not make this process wait.
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
