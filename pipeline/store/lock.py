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

from pipeline.errors import ResourceError

logger = logging.getLogger(__name__)


@contextmanager
def writer_lock(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the store's lock for the duration of the block.

    Raises:
        ResourceError: If another process holds it and `wait` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            if not wait:
                raise ResourceError(
                    f"{path.parent}: {holder} is writing this store; wait for it to finish or "
                    f"stop it"
                ) from None
            logger.warning("%s: waiting for %s, which is writing this store", path.parent, holder)
            fcntl.flock(file, fcntl.LOCK_EX)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield
