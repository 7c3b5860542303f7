"""Reuse segments of other stores that hold the same rows, instead of computing them again.

A segment's features depend on its rows, its batches and its teacher, not on its store. So a store
of a grown corpus, or of a larger fraction of it, starts with the segments of an earlier store. The
result is the same: a reused segment has the digest that capturing it would give.
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
"""Options that select rows and do not change the features of any row."""


def _comparable(plan: Mapping[str, Any]) -> dict[str, Any]:
    """Return everything that a segment's features depend on in addition to its rows."""
    spec = {key: value for key, value in plan["spec"].items() if key not in ("tokens", "parts")}
    cut = {key: value for key, value in spec["segments"].items() if key not in CHOICE}
    # For `auto` the number is in the plan's record once it is determined; see `keep_to`.
    return spec | {"segments": cut, "task": plan["task"], "pad_id": plan["pad_id"]}


class Reuse:
    """The other stores that may hold segments of a store."""

    def __init__(
        self,
        layout: Layout,
        plan: Plan,
        rows: Rows,
        description: Mapping[str, Any],
        *,
        takes_skipped: bool,
    ) -> None:
        """Find them; only their records are read here.

        Args:
            layout: The store to capture to.
            plan: Its segment plan.
            rows: Its rows.
            description: The fields of its plan's record: spec, task, pad_id.
            takes_skipped: Also reuse segments with skipped examples that were not finite.
        """
        self._plan = plan
        self._rows = rows
        self._takes_skipped = takes_skipped
        self._stores = list(_other_stores(layout, _comparable(description)))
        self._receipts_of: dict[tuple[Path, str], dict[str, Receipt]] = {}

    def __bool__(self) -> bool:
        """Whether there is such a store."""
        return bool(self._stores)

    @property
    def batch_tokens(self) -> int | None:
        """The number that `batch_tokens: auto` became in one of the stores, None if in none."""
        numbers = (reader.plan.get("batch_tokens") for reader in self._stores)
        return next((number for number in numbers if number is not None), None)

    def keep_to(self, batch_tokens: int) -> None:
        """Drop stores whose `batch_tokens: auto` became another number, as their batches differ."""
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
        """Return each signal's missing segments that no other store has, which need disk space.

        Args:
            signals: The requested signals.
            missing: The missing segments by signal; a signal without an entry lacks all of them.
        """
        left: dict[str, list[int]] = {}
        for signal in signals:
            codes = [SPLITS.index(split) for split in splits_of(signal)]
            every = np.flatnonzero(np.isin(self._plan.segment_split, codes)).tolist()
            elsewhere: set[str] = set()
            for reader in self._stores:
                declared = _declared(reader, signal.name)
                if declared is not None:
                    elsewhere |= self._receipts(reader, declared).keys()
            numbers = missing.get(signal.name, every)
            left[signal.name] = [n for n in numbers if self._identities[n] not in elsewhere]
        return left

    def take(
        self, writers: Mapping[str, SignalWriter], missing: Mapping[str, Sequence[int]]
    ) -> dict[str, list[int]]:
        """Copy missing segments from the stores that have them; return what is still missing.

        Raises:
            ResourceError: If the file system refuses; segments copied so far stay.
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
                    "%d of %d segments are taken from store %s",
                    len(taken), self._plan.segments, reader.layout.root.name,
                )  # fmt: skip
        return left

    def _take(self, reader: StoreReader, writer: SignalWriter, numbers: list[int]) -> set[int]:
        """Copy segments of one signal from one store; return the copied ones."""
        name = writer.declared.name
        declared = _declared(reader, name)
        if declared is None:
            return set()
        receipts = self._receipts(reader, declared)
        offered = {n: receipts[i] for n in numbers if (i := self._identities[n]) in receipts}
        if offered and declared.digest() != writer.declared.digest():
            ours, theirs = writer.declared.to_json(), declared.to_json()
            logger.warning(
                "%s: %d segments of store %s have the same rows but are computed again, because "
                "its declaration differs in %s",
                name, len(offered), reader.layout.root.name,
                ", ".join(key for key in ours if ours[key] != theirs[key]),
            )  # fmt: skip
            return set()
        if not offered:
            return set()
        try:
            adoption = Adoption(writer, reader)
        except (IntegrityError, IncompatibleError) as error:
            logger.warning(
                "%s: no segment of this store is reused: %s", reader.layout.root.name, error
            )
            return set()
        return {number for number, receipt in offered.items() if adoption.take(number, receipt)}

    def _receipts(self, reader: StoreReader, declared: Declaration) -> dict[str, Receipt]:
        key = reader.layout.root, declared.name
        if key not in self._receipts_of:
            receipts = receipts_by_rows(reader, declared.name, declared.digest())
            self._receipts_of[key] = {
                rows: receipt
                for rows, receipt in receipts.items()
                if self._takes_skipped or not receipt.skipped
            }
        return self._receipts_of[key]


def _other_stores(layout: Layout, comparable: Mapping[str, Any]) -> Iterator[StoreReader]:
    """Yield the stores with the same teacher and batches, whatever their rows."""
    for path in sorted(layout.root.parent.iterdir()):
        if path.name.startswith(".") or path == layout.root:
            continue
        try:
            # This user may not be allowed to read it.
            if not path.is_dir():
                continue
            reader = StoreReader(path)
            if _comparable(reader.plan) == comparable:
                yield reader
        except (DecantError, OSError, KeyError, AttributeError) as error:
            logger.debug("%s: cannot be reused: %s", path, error)


def _declared(reader: StoreReader, signal: str) -> Declaration | None:
    """Return a signal's declaration in another store, None if it has none."""
    try:
        record = read_record(reader.layout.declaration(signal), reader.layout.root)
        return Declaration.from_json(record)
    except IntegrityError:
        return None
