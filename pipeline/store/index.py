"""The index, `manifest.json`: which signals and assets of a store count. Replaced atomically.

Readers open only what it lists, so a signal that is being written, or half removed, does not exist
for them.
"""

from typing import Any

import google_crc32c

from pipeline.provenance import read_json, write_json
from pipeline.store.layout import FORMAT, Layout
from pipeline.store.shards import file_digest


def read_index(layout: Layout) -> dict[str, Any]:
    """Return the index, or an empty one for a store without any whole signal."""
    if not layout.index.exists():
        return {"format": FORMAT, "signals": {}, "assets": {}}
    return read_json(layout.index)


def write_index(layout: Layout, index: dict[str, Any]) -> None:
    """Replace the index; it pins the plan's record, so a plan that was altered is noticed."""
    plan = layout.plan.read_bytes()
    index["plan"] = {"bytes": len(plan), "crc32c": google_crc32c.value(plan)}
    write_json(layout.index, index)


def index_signal(layout: Layout, signal: str, digest: str) -> None:
    """Make a whole signal visible to readers."""
    index = read_index(layout)
    manifest = layout.manifest(signal)
    index["signals"][signal] = {"digest": digest, "manifest": file_digest(manifest, layout.root)}
    write_index(layout, index)


def index_asset(layout: Layout, name: str, record: dict[str, Any]) -> None:
    """Make a whole asset (for example the teacher's blocks) visible to readers."""
    index = read_index(layout)
    index["assets"][name] = record
    write_index(layout, index)


def withdraw(layout: Layout, signal: str) -> None:
    """Hide a signal from readers: index first, then manifest; shards and receipts stay."""
    index = read_index(layout)
    if index["signals"].pop(signal, None) is not None:
        write_index(layout, index)
    layout.manifest(signal).unlink(missing_ok=True)
