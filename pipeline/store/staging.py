"""Stages shards: any process may write them aside, the holder of the lock moves them into place.

A worker may outlive the capture that started it. It writes only to the directory of its attempt,
which the next capture removes, and never moves files into the store. So it does no harm, however
late it continues.
"""

from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from pipeline.errors import ResourceError
from pipeline.provenance import fsync_directory, make_directory, refused, write_file
from pipeline.store.codec import encode_shard
from pipeline.store.layout import Layout
from pipeline.store.shards import bytes_digest


def stage_shard(
    layout: Layout, name: str, values: NDArray[Any], chunk_rows: int, *, attempt: str
) -> dict[str, int]:
    """Write `values` as the future shard `name` of a store, aside and durably.

    Creates no directory: if that of the attempt is gone, another capture has taken over.

    Returns:
        Size and checksum of the file, as in receipts.

    Raises:
        ResourceError: If the attempt is over, or the file system refuses.
    """
    data = encode_shard(values, chunk_rows)
    digest = bytes_digest(data)
    path = layout.staged(attempt, name, digest["xxh3"])
    try:
        write_file(path, data, aside=path.parent)
    except FileNotFoundError as error:
        raise _over(layout, attempt) from error
    except OSError as error:
        raise refused(path, error, len(data)) from error
    return digest


def publish_shards(layout: Layout, files: Mapping[str, dict[str, int]], *, attempt: str) -> None:
    """Move staged shards into place, durably. Only the holder of the store's lock may call this.

    Args:
        layout: The store.
        files: Size and checksum of each shard by its name, as `stage_shard` returns them.
        attempt: The attempt in which they were staged.

    Raises:
        ResourceError: If a staged shard is gone, or the file system refuses.
    """
    if not files:
        return
    targets = [layout.root / name for name in files]
    try:
        for target, (name, entry) in zip(targets, files.items(), strict=True):
            make_directory(target.parent)
            layout.staged(attempt, name, entry["xxh3"]).replace(target)
        # The staging directory is not synced: names that reappear there are deleted unread.
        for directory in {target.parent for target in targets}:
            fsync_directory(directory)
    except FileNotFoundError as error:
        raise _over(layout, attempt) from error
    except OSError as error:
        raise refused(targets[0], error) from error


def _over(layout: Layout, attempt: str) -> ResourceError:
    return ResourceError(
        f"{layout.attempt(attempt)}: is gone, so another capture has taken over this store; let it "
        "finish, or run the same command again"
    )
