"""The index, `manifest.json`: the signals and assets of a store that readers see.

A signal that is being written or removed is not listed, so readers do not see it. The index is
replaced atomically. Its content is also in the manifests, from which a lost index is rebuilt.
"""

import logging
from typing import Any

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.provenance import sync_what_is_there
from pipeline.store.layout import FORMAT, Layout
from pipeline.store.schema import check_index, check_manifest
from pipeline.store.sealed import read_record, write_record
from pipeline.store.shards import file_digest, matches

logger = logging.getLogger(__name__)


def read_index(layout: Layout) -> dict[str, Any]:
    """Return the index.

    Raises:
        IntegrityError: If it is missing, altered, or not an index.
        IncompatibleError: If the store is of another format.
    """
    index = read_record(layout.index, layout.root)
    if index.get("format") != FORMAT:
        raise IncompatibleError(
            f"{layout.root}: store format {index.get('format')}, this software reads {FORMAT}; "
            "capture again with this version"
        )
    check_index(index, layout.index)
    return index


def ensure_index(layout: Layout) -> None:
    """Make sure that there is an index that pins the present plan's record; else rebuild it.

    Only the writer may call this, under the store's lock.

    Raises:
        IncompatibleError: If the store is of another format.
    """
    plan = file_digest(layout.plan, layout.root)
    sync_what_is_there([layout.manifests, layout.root])
    try:
        if read_index(layout)["plan"] == plan:
            return
    except IntegrityError as error:
        if layout.index.exists():
            logger.warning("the index is rebuilt from the manifests: %s", error)
    index: dict[str, Any] = {"format": FORMAT, "plan": plan, "signals": {}, "assets": {}}
    for path in sorted(layout.manifests.glob("*.json")):
        if path == layout.plan:
            continue
        try:
            manifest = read_record(path, layout.root)
            check_manifest(manifest, path)
        except IntegrityError as error:
            logger.warning("a signal is left out of the index: %s", error)
            continue
        signal = manifest["declaration"]["signal"]
        if path == layout.manifest(signal):
            entry = {"digest": manifest["digest"], "manifest": file_digest(path, layout.root)}
            index["signals"][signal] = entry
    for path in sorted(layout.asset_records.glob("*.json")):
        try:
            record = read_record(path, layout.root)
            check_index({**index, "assets": {path.stem: record}}, path)
        except IntegrityError as error:
            logger.warning("an asset is left out of the index: %s", error)
            continue
        expected = {key: record[key] for key in ("bytes", "xxh3")}
        if matches(layout.assets / record["file"], layout.root, expected, verify=True):
            index["assets"][path.stem] = record
    write_record(layout.index, index)


def index_signal(layout: Layout, signal: str, digest: str) -> None:
    """Make a complete signal visible to readers."""
    index = read_index(layout)
    manifest = file_digest(layout.manifest(signal), layout.root)
    index["signals"][signal] = {"digest": digest, "manifest": manifest}
    write_record(layout.index, index)


def index_asset(layout: Layout, name: str, record: dict[str, Any]) -> None:
    """Make an asset (for example the teacher's blocks) visible to readers."""
    write_record(layout.asset_records / f"{name}.json", record)
    index = read_index(layout)
    index["assets"][name] = record
    write_record(layout.index, index)


def withdraw(layout: Layout, signal: str) -> None:
    """Hide a signal from readers: remove its index entry, then its manifest.

    Shards and receipts stay.

    Raises:
        IntegrityError: If the index cannot be read, or the manifest's path is not a file.
    """
    index = read_index(layout)
    if index["signals"].pop(signal, None) is not None:
        write_record(layout.index, index)
    manifest = layout.manifest(signal)
    try:
        manifest.unlink()
    except FileNotFoundError:
        return
    except (IsADirectoryError, NotADirectoryError) as error:
        raise IntegrityError(
            f"{manifest}: {error.strerror}, expected a file in a directory; run `decant verify "
            f"{layout.root} --repair`"
        ) from error
    # Otherwise it could reappear after a power cut, and a rebuilt index would list it.
    sync_what_is_there([layout.manifests])
