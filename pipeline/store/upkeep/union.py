"""Checks whether a copy may be added to what its target already contains.

This requires equal plans, and that no signal, asset or statistics file in the target would change.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, IncompatibleError, IntegrityError
from pipeline.store.index import read_index
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.store.records import of_manifest
from pipeline.store.schema import check_plan
from pipeline.store.sealed import read_record


def target_of(source: Path, target: Path) -> Path:
    """Return the directory of a copy of `source`: `target`, or a directory in it.

    Raises:
        ConfigError: If it is a file, the source, or inside the source.
        IncompatibleError: If `target` is itself a store of another name.
    """
    name = source.resolve().name
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{target}: is a file; expected a directory of stores")
    root = target if target.resolve().name == name else target / name
    if root.resolve().is_relative_to(source.resolve()):
        raise ConfigError(f"{root}: is the store {source} or in it; give another directory")
    layout = Layout(target)
    if root != target and any(path.exists() for path in (layout.index, layout.plan)):
        raise IncompatibleError(
            f"{target}: is a store, expected a directory of stores or a path that ends in {name}; "
            f"give {target.parent}"
        )
    return root


def check_union(
    layout: Layout, reader: StoreReader, signals: Sequence[str], assets: Sequence[str]
) -> list[str]:
    """Check that signals and assets of `reader` can be added to the store at `layout`.

    Returns:
        The existing signals with equal values in different bytes; they must be withdrawn while
        their files are replaced.

    Raises:
        IncompatibleError: If the target has another plan, or another signal or asset of the same
            name.
    """
    try:
        plan = read_record(layout.plan, layout.root)
        check_plan(plan, layout.plan)
    except IntegrityError:
        plan = None  # missing or altered: without a plan there is no store
    if plan is not None and plan != reader.plan:
        raise IncompatibleError(
            f"{layout.root}: has the plan of {_of(plan)}, expected that of {_of(reader.plan)}, as "
            f"in {reader.layout.root}; give another directory"
        )
    try:
        index = read_index(layout)
    except IntegrityError:
        return []  # rebuilt from the manifests at the end of the copy
    renewed = []
    for name in signals:
        found, mine = index["signals"].get(name), reader.index["signals"][name]
        if found and found["digest"] != mine["digest"]:
            raise IncompatibleError(
                f"{layout.root}: {name} has digest {found['digest'][:16]} there, "
                f"{mine['digest'][:16]} in {reader.layout.root}; copy to another directory, or "
                "leave the signal out"
            )
        if found and found["manifest"] != mine["manifest"]:
            renewed.append(name)
    for asset in assets:
        found, mine = index["assets"].get(asset), reader.index["assets"][asset]
        if found and found != mine:
            raise IncompatibleError(
                f"{layout.root}: has another asset {asset} ({found['xxh3']:016x}), expected "
                f"{mine['xxh3']:016x}, as in {reader.layout.root}; copy to another directory"
            )
    _check_statistics(layout, index, reader, signals)
    return renewed


def _check_statistics(
    layout: Layout, index: dict[str, Any], reader: StoreReader, signals: Sequence[str]
) -> None:
    """Check the statistics of layers: all forms of a layer share one file."""
    declared = [reader.signal(name).declaration for name in signals]
    mine = {(one.kind, one.layer): one.channels for one in declared if one.channels}
    for name, entry in index["signals"].items():
        try:
            path = layout.manifest(name)
            other, _ = of_manifest(read_record(path, layout.root, entry["manifest"]), path)
        except IntegrityError:
            continue  # readers refuse it anyway
        place = (other.kind, other.layer)
        if other.channels and place in mine and other.channels != mine[place]:
            raise IncompatibleError(
                f"{layout.root}: {name} was standardised with statistics "
                f"{other.channels['xxh3']:016x}, those in {reader.layout.root} are "
                f"{mine[place]['xxh3']:016x}; copy to another directory"
            )


def _of(plan: dict[str, Any]) -> str:
    """Describe a plan in a few words."""
    spec = plan.get("spec", {})
    weights = str(spec.get("teacher", {}).get("weights_sha256", "unknown"))[:12]
    tokens = str(spec.get("tokens", "unknown"))[:12]
    return f"{plan.get('examples', 0):,} examples (tokens {tokens}, teacher {weights})"
