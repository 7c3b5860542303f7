"""Tell whether a store is complete, from JSON records and file sizes, and write its manifests.

DVC tracks the manifests, `data/manifests/<teacher>/`. They hold digests of values and no host, time
or bytes on disk, so capturing a lost store again with equal values re-runs no student.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import IntegrityError
from pipeline.provenance import read_json, sync_what_is_there, write_json
from pipeline.store.commit import trusted_receipt
from pipeline.store.index import read_index
from pipeline.store.layout import BLOCKS, Layout
from pipeline.store.reader import StoreReader
from pipeline.store.records import Declaration
from pipeline.store.signals import Signal, dotted, manifest_record
from pipeline.teacher.source.reference import TeacherReference


def is_complete(layout: Layout, signals: Sequence[Signal], blocks: Sequence[int]) -> bool:
    """Tell whether all requested signals and blocks are indexed and their files complete."""
    try:
        reader = StoreReader(layout.root)
        index = read_index(layout)
        entry = index["assets"].get(BLOCKS)
        if blocks and (
            entry is None
            or entry.get("layers") != list(blocks)
            or not (layout.assets / entry["file"]).is_file()
            or (layout.assets / entry["file"]).stat().st_size != entry["bytes"]
        ):
            return False
        files = {name: record["bytes"] for name, record in reader.plan["files"].items()}
        for name, size in files.items():
            if not (layout.root / name).is_file() or (layout.root / name).stat().st_size != size:
                return False
        has_signals = all(
            signal.name in index["signals"]
            and _has_assets(layout, reader.signal(signal.name).declaration)
            and all(
                trusted_receipt(layout, signal.name, segment, verify=False)
                for segment in reader.signal(signal.name).receipts
            )
            for signal in signals
        )
    except IntegrityError:
        return False
    if has_signals:
        # A capture killed at its last step may have renamed the index without syncing the rename.
        sync_what_is_there([layout.root])
    return has_signals


def _has_assets(layout: Layout, declared: Declaration) -> bool:
    """Tell whether the statistics and assets that a signal names exist with their sizes."""
    files = {}
    if declared.channels is not None:
        files[layout.channels(declared.kind, declared.layer)] = declared.channels
    for entry in declared.asset_entries.values():
        files[layout.assets / entry["file"]] = entry
    return all(
        path.is_file() and path.stat().st_size == entry["bytes"] for path, entry in files.items()
    )


def write_manifests(
    layout: Layout,
    output: Path,
    reference: TeacherReference,
    signals: Sequence[Signal],
    blocks: Sequence[int],
) -> None:
    """Write `store.json`, one JSON file per requested signal, and `blocks.json` if requested.

    Only the current request is listed; signals of earlier captures stay in the store.
    """
    reader = StoreReader(layout.root)
    records: dict[str, Any] = {
        "store": {
            "store": layout.root.name,
            "task": reader.plan["task"],
            "layers": reference.layers,
            "config": reference.config,
        }
    }
    for signal in signals:
        stored = reader.signal(signal.name)
        records[dotted(signal.name)] = manifest_record(signal, stored.digest) | {
            "tokens": stored.tokens,
            "segments": len(stored.receipts),
            "store": layout.root.name,
        }
    if blocks:
        entry = reader.index["assets"][BLOCKS]
        records[BLOCKS] = {
            "signal": BLOCKS,
            "layers": list(blocks),
            "digest": f"{entry['bytes']}-{entry['xxh3']:016x}",
            "store": layout.root.name,
        }
    for stale in set(output.glob("*.json")) - {output / f"{name}.json" for name in records}:
        stale.unlink(missing_ok=True)
    for name, record in records.items():
        path = output / f"{name}.json"
        if not path.exists() or read_json(path) != record:
            write_json(path, record)
