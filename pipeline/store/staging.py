"""Shards on their way: any process writes them aside, the holder of the lock puts them in place.

A worker may outlive the capture that started it. It writes below a directory of its attempt, which
goes when the next capture takes the store, and it never renames into the store: so it can harm
nothing, however late it wakes up.
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
    """Write `values` aside, durably, as what the shard `name` of a store is to be.

    Makes no directory: where that of the attempt is gone, another capture has taken over.

    Returns:
        Size and checksum of the file, as receipts hold them.

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
    """Put staged shards in place, durably: for the holder of the store's lock alone.

    Args:
        layout: The store.
        files: What `stage_shard` returned for each shard, by name.
        attempt: The attempt that they were staged in.

    Raises:
        ResourceError: If a staged shard is gone, or the file system refuses.
    """
    if not files:
        return
    places = [layout.root / name for name in files]
    try:
        for place, (name, entry) in zip(places, files.items(), strict=True):
            make_directory(place.parent)
            layout.staged(attempt, name, entry["xxh3"]).replace(place)
        # The staging directory is not synced: a name that comes back there is deleted unread.
        for directory in {place.parent for place in places}:
            fsync_directory(directory)
    except FileNotFoundError as error:
        raise _over(layout, attempt) from error
    except OSError as error:
        raise refused(places[0], error) from error


def _over(layout: Layout, attempt: str) -> ResourceError:
    return ResourceError(
        f"{layout.attempt(attempt)}: is gone, so another capture has taken over this store; let it "
        "finish, or run the same command again"
    )
