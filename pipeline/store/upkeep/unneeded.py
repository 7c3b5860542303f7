"""Finds what no revision needs: entire stores, and signals and assets of needed stores.

A store is needed if a manifest names it, and a signal if a manifest names it in that store. No
manifest names an interrupted capture: its pending signals stay, but a store without any complete
signal counts as unneeded.
"""

import logging
from collections.abc import Mapping, Set
from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.store.index import read_index
from pipeline.store.layout import BLOCKS, Layout
from pipeline.store.lock import holder_of
from pipeline.store.signals import dotted
from pipeline.store.upkeep.contents import assets_of
from pipeline.store.upkeep.gc import (
    REMOVED,
    bytes_of,
    declarations_of,
    freed_bytes,
    is_store,
    places_of,
    remove_signal,
    remove_store,
)

logger = logging.getLogger(__name__)
SIGNALS = ("hidden/*/*-*", "attention/*/*-*", "value/*/*-*", "logits/*-*")
"""Patterns of the directories of signals below `features.zarr`."""


@dataclass(frozen=True)
class Unneeded:
    """A store, or one signal or asset of a store, that no revision names.

    Attributes:
        store: The store's directory.
        name: The signal or asset; None for the entire store.
        bytes: The bytes that its removal frees.
        reason: Why it is not needed.
        holder: The process that is writing the store, which prevents removal; else None.
    """

    store: Path
    name: str | None
    bytes: int
    reason: str
    holder: str | None

    def remove(self) -> int:
        """Delete it; return the bytes that its files had.

        Raises:
            ResourceError: If another process is writing the store.
        """
        if self.name is None:
            return remove_store(self.store)
        return remove_signal(self.store, self.name)


def unneeded(stores: Path, named: Mapping[str, Set[str]]) -> list[Unneeded]:
    """Return what no manifest names, and the remains of interrupted removals.

    Args:
        stores: Directory of stores, `data/stores`.
        named: The signals, and `blocks`, that manifests name, by the name of their store.
    """
    found: list[Unneeded] = []
    if not stores.is_dir():
        return found
    for path in sorted(filter(is_store, stores.iterdir())):
        try:
            found += _unneeded_of(path, named.get(path.name))
        except (IntegrityError, IncompatibleError) as error:
            logger.warning("%s: is not looked at: %s", path.name, error)
    return found


def _unneeded_of(path: Path, named: Set[str] | None) -> list[Unneeded]:
    """Return what is not needed of one store; the entire store if no manifest names it."""
    layout = Layout(path)
    holder = holder_of(layout.lock)
    if named is None:
        reason = "left of a removal" if path.name.startswith(REMOVED) else "no revision names it"
        return [Unneeded(path, None, freed_bytes(path), reason, holder)]
    return [
        Unneeded(path, name, sum(map(bytes_of, places_of(layout, name))), reason, holder)
        for name, reason in _unneeded_in(layout, named).items()
    ]


def _unneeded_in(layout: Layout, named: Set[str]) -> dict[str, str]:
    """Return the signals and assets of a needed store that are not needed, with reasons.

    Raises:
        IntegrityError: If the store's index or a declaration cannot be read.
    """
    index = read_index(layout)
    declared = declarations_of(layout)
    found = {name: "no revision names it" for name in index["signals"] if name not in named}
    for pattern in SIGNALS:
        for path in layout.features.glob(pattern):
            name = path.relative_to(layout.features).as_posix()
            if dotted(name) not in declared and name not in index["signals"]:
                found[name] = "left of a removal"
    needed = {asset for declaration in declared.values() for asset in assets_of(declaration)}
    for asset in index["assets"]:
        if asset == BLOCKS and BLOCKS not in named:
            found[asset] = "no revision names it"
        elif asset != BLOCKS and asset not in needed:
            found[asset] = "no signal needs it"
    return dict(sorted(found.items()))
