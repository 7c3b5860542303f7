"""Old segments of a grown corpus: what another store has of the same rows is taken, not computed.

Which rows, in which batches, by which teacher decides a segment's features; where it lies does not.
So a store of more text, or of a larger share of it, begins with the segments of the store before.
What is in a store does not depend on it: every segment has the digest that the teacher would give.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.axes import SPLITS
from pipeline.errors import DecantError, IncompatibleError, IntegrityError
from pipeline.store.adopt import Adoption, receipts_by_rows
from pipeline.store.commit import SignalWriter
from pipeline.store.layout import Layout
from pipeline.store.plan import Plan
from pipeline.store.planner import Rows, rows_digest
from pipeline.store.reader import StoreReader
from pipeline.store.records import Declaration, Receipt
from pipeline.store.sealed import read_record
from pipeline.store.signals import Signal
from pipeline.teacher.capture.request import splits_of

logger = logging.getLogger(__name__)
CHOICE = ("fraction", "limit", "seed")
"""Options that decide which rows there are and no feature of any of them."""


def _comparable(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the features of a segment depend on beside its rows."""
    spec = {key: value for key, value in plan["spec"].items() if key not in ("tokens", "parts")}
    cut = {key: value for key, value in spec["segments"].items() if key not in CHOICE}
    # Of `auto` the number that was found stands in the record, once there is one; see `keep_to`.
    return spec | {"segments": cut, "task": plan["task"], "pad_id": plan["pad_id"]}


class Reuse:
    """The stores beside one that may have segments of it."""

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        rows: Rows,
        description: Mapping[str, Any],
        *,
        takes_skipped: bool,
    ) -> None:
        """Look for them; nothing is read of them yet but their records.

        Args:
            layout: The store that is captured to.
            plan: Its plan.
            rows: Its rows.
            description: What its plan's record will say: spec, task, pad_id.
            takes_skipped: Take also segments of which examples are skipped, as not finite.
        """
        self._plan = plan
        self._rows = rows
        self._takes_skipped = takes_skipped
        self._stores = list(_stores_beside(layout, _comparable(description)))
        self._found: dict[tuple[Path, str], dict[str, Receipt]] = {}

    def __bool__(self) -> bool:
        """Whether there is such a store at all."""
        return bool(self._stores)

    @property
    def batch_tokens(self) -> int | None:
        """What `batch_tokens: auto` came to in a store that may have segments, if it is that."""
        found = (reader.plan.get("batch_tokens") for reader in self._stores)
        return next((number for number in found if number is not None), None)

    def keep_to(self, batch_tokens: int) -> None:
        """Leave out stores whose `batch_tokens: auto` came to another number: other batches."""
        self._stores = [
            reader
            for reader in self._stores
            if reader.plan.get("batch_tokens", batch_tokens) == batch_tokens
        ]

    @cached_property
    def _identities(self) -> list[str]:
        """The identity of each segment's rows."""
        digests = self._rows.digests
        return [rows_digest(digests[self._plan.in_segment(n)]) for n in range(self._plan.segments)]

    def left_over(
        self, signals: Sequence[Signal], missing: Mapping[str, Sequence[int]]
    ) -> dict[str, list[int]]:
        """Return the segments of each signal that no store seems to have: what takes room.

        Args:
            signals: What is asked for.
            missing: The segments that a signal lacks; all of them for one that is not named.
        """
        found: dict[str, list[int]] = {}
        for signal in signals:
            codes = [SPLITS.index(split) for split in splits_of(signal)]
            every = np.flatnonzero(np.isin(self._plan.segment_split, codes)).tolist()
            there: set[str] = set()
            for reader in self._stores:
                declared = _declared(reader, signal.name)
                if declared is not None:
                    there |= self._receipts(reader, declared).keys()
            wanted = missing.get(signal.name, every)
            found[signal.name] = [n for n in wanted if self._identities[n] not in there]
        return found

    def take(
        self, writers: Mapping[str, SignalWriter], missing: Mapping[str, Sequence[int]]
    ) -> dict[str, list[int]]:
        """Take what is missing from the stores that have it; return what is missing still.

        Raises:
            ResourceError: If the file system refuses; what was taken stays.
        """
        left = {name: list(numbers) for name, numbers in missing.items()}
        for reader in self._stores:
            taken: set[int] = set()
            for name, writer in writers.items():
                if not (writer.is_stored and left[name]):
                    continue
                done = self._take(reader, writer, left[name])
                left[name] = [number for number in left[name] if number not in done]
                taken |= done
            if taken:
                logger.info(
                    "%d of %d segments are those of store %s",
                    len(taken), self._plan.segments, reader.layout.root.name,
                )  # fmt: skip
        return left

    def _take(self, reader: StoreReader, writer: SignalWriter, wanted: list[int]) -> set[int]:
        """Take segments of one signal from one store; return those that were."""
        name = writer.declared.name
        declared = _declared(reader, name)
        if declared is None:
            return set()
        receipts = self._receipts(reader, declared)
        offered = {n: receipts[i] for n in wanted if (i := self._identities[n]) in receipts}
        if offered and declared.digest() != writer.declared.digest():
            ours, theirs = writer.declared.to_json(), declared.to_json()
            logger.warning(
                "%s: %d segments of store %s are of the same rows and are computed anew: its "
                "declaration differs in %s",
                name, len(offered), reader.layout.root.name,
                ", ".join(key for key in ours if ours[key] != theirs[key]),
            )  # fmt: skip
            return set()
        if not offered:
            return set()
        try:
            adoption = Adoption(writer, reader)
        except (IntegrityError, IncompatibleError) as error:
            logger.warning("%s: nothing is taken over from it: %s", reader.layout.root.name, error)
            return set()
        return {number for number, receipt in offered.items() if adoption.take(number, receipt)}

    def _receipts(self, reader: StoreReader, declared: Declaration) -> dict[str, Receipt]:
        key = reader.layout.root, declared.name
        if key not in self._found:
            found = receipts_by_rows(reader, declared.name, declared.digest())
            self._found[key] = {
                rows: receipt
                for rows, receipt in found.items()
                if self._takes_skipped or not receipt.skipped
            }
        return self._found[key]


def _stores_beside(layout: Layout, wanted: Mapping[str, Any]) -> Iterator[StoreReader]:
    """Yield the stores of the same teacher, computed alike, whatever their rows."""
    for path in sorted(layout.root.parent.iterdir()):
        if path.name.startswith(".") or path == layout.root:
            continue
        try:
            # It may be one that this user may not read.
            if not path.is_dir():
                continue
            reader = StoreReader(path)
            if _comparable(reader.plan) == wanted:
                yield reader
        except (DecantError, OSError, KeyError, AttributeError) as error:
            logger.debug("%s: not to be taken from: %s", path, error)


def _declared(reader: StoreReader, signal: str) -> Declaration | None:
    """Return how another store declares a signal, if it does."""
    try:
        record = read_record(reader.layout.declaration(signal), reader.layout.root)
        return Declaration.from_json(record)
    except IntegrityError:
        return None
