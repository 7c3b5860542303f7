"""Lists the contents of a store from its records: arrays, files with checksums, and dependencies.

No shard is opened. Names are paths within the store; one that leads out of it is refused.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import ConfigError, IncompatibleError, IntegrityError
from pipeline.store.extent import segment_extent
from pipeline.store.planner import EXAMPLE_TYPES, example_array, target_type, token_array
from pipeline.store.reader import StoreReader
from pipeline.store.records import Declaration
from pipeline.store.shards import ArraySpec


def planned_arrays(plan: Mapping[str, Any]) -> dict[str, ArraySpec]:
    """Return the arrays that the planner wrote, by path below `features.zarr`."""
    count, capacity, chunk = len(plan["segments"]), plan["segment_tokens"], plan["chunk_tokens"]
    arrays = {
        f"tokens/{column}": token_array(column, count, capacity, chunk)
        for column in plan["columns"]
    }
    types = dict(EXAMPLE_TYPES)
    if plan.get("outputs", 0):
        types["targets"] = target_type(plan["outputs"])
    for name, array_type in types.items():
        arrays[f"examples/{name}"] = example_array(array_type, plan["examples"])
    return arrays


def signal_arrays(
    declared: Declaration,
    plan: Mapping[str, Any],
    *,
    length: NDArray[np.integer[Any]],
    segment: NDArray[np.integer[Any]],
) -> dict[str, ArraySpec]:
    """Return the arrays of a signal, by path below `features.zarr`.

    Args:
        declared: The signal.
        plan: The plan's record.
        length: Tokens of every example of the plan.
        segment: The segment of every example.
    """
    extent = segment_extent(declared.axis, plan, length=length, segment=segment, rule=declared.rule)
    rows = len(plan["segments"]) * extent.shard_rows
    return {
        f"{declared.name}/{name}": ArraySpec(
            array_type, rows, extent.shard_rows, extent.chunk_rows, declared.axis
        )
        for name, array_type in declared.arrays().items()
    }


def signal_files(reader: StoreReader, signal: str) -> dict[str, dict[str, int]]:
    """Return size and checksum of each file of a complete signal: statistics and shards."""
    stored = reader.signal(signal)
    files: dict[str, dict[str, int]] = {}
    if stored.declaration.channels is not None:
        path = reader.layout.channels(stored.declaration.kind, stored.declaration.layer)
        files[str(path.relative_to(reader.layout.root))] = stored.declaration.channels
    for receipt in stored.receipts.values():
        files |= receipt.files
    return {inside(name, reader.layout.root): entry for name, entry in files.items()}


def asset_file(reader: StoreReader, asset: str) -> tuple[str, dict[str, int]]:
    """Return the path, and size and checksum, of an asset's file."""
    record = reader.index["assets"][asset]
    name = f"{reader.layout.assets.name}/{record['file']}"
    return inside(name, reader.layout.root), {key: record[key] for key in ("bytes", "xxh3")}


def inside(name: str, root: Path) -> str:
    """Return the name of a file or signal after checking that its path is inside the store `root`.

    Raises:
        IntegrityError: If the path is absolute or leads out of the store.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise IntegrityError(
            f"{root}: its records name {name!r}, expected a place inside the store; do not use "
            "this store"
        )
    return name


def assets_of(declared: Declaration) -> set[str]:
    """Return the names of the assets that decoding a signal needs."""
    return {*declared.asset_entries, *declared.assets}


def find_signal(signals: Sequence[str], wanted: str) -> str:
    """Return the only signal with a name or the beginning of a name, such as `hidden/2`.

    Raises:
        ConfigError: If several names begin so.
        IncompatibleError: If none does.
    """
    if wanted in signals:
        return wanted
    stem = wanted.rstrip("/")
    # Only at the end of a word: layer 2 is not layer 20.
    fitting = [name for name in signals if name.startswith((f"{stem}/", f"{stem}-"))]
    if not fitting:
        raise IncompatibleError(
            f"signal {wanted}: not in the store, which has {', '.join(signals) or 'none'}; name "
            "one of them"
        )
    if len(fitting) > 1:
        raise ConfigError(f"signal {wanted}: fits {', '.join(fitting)}; name one of them")
    return fitting[0]


def with_needed(reader: StoreReader, signals: Iterable[str]) -> list[str]:
    """Return signals and the signals that decoding them needs, sorted.

    Any form of a needed layer will do, so all of them are added unless one is among `signals`.
    """
    chosen = set(signals)
    for name in sorted(chosen):
        declared = reader.signal(name).declaration
        for kind, layer in declared.needs.items():
            forms = {other for other in reader.signals if other.startswith(f"{kind}/{layer}/")}
            if not chosen & forms:
                chosen |= forms
    return sorted(chosen)
