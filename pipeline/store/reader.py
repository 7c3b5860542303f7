"""Reads a store: only complete signals and intact files, with rows joined by their identity.

Opening reads two JSON records. A segment is read at once, one shard an array: the file's bytes are
checked by size and checksum, and the same bytes are decoded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.axes import TRAIN
from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.store.attachments import Attachments
from pipeline.store.extent import example_rows, first_rows, segment_extent
from pipeline.store.forms.form import Channels
from pipeline.store.index import read_index
from pipeline.store.layout import Layout
from pipeline.store.planner import (
    EXAMPLE_TYPES,
    example_array,
    rows_digest,
    target_type,
    token_array,
)
from pipeline.store.records import Declaration, StoredSignal, of_manifest, signal_digest
from pipeline.store.schema import check_plan
from pipeline.store.sealed import read_record
from pipeline.store.shards import ArraySpec, read_shard, shard_name
from pipeline.store.table import check_ids, check_rows, check_table, count_ids


@dataclass(frozen=True)
class Segment:
    """One segment in memory, in stored dtypes.

    Attributes:
        number: The segment's number.
        examples: Positions in the reader's example table of the examples with usable features.
        offset: First token of each example within the segment.
        length: Tokens of each example.
        slot: Row of each example in arrays on the example axis.
        tokens: The token columns of the segment.
        features: The arrays of each signal by name, over all of the segment.
        spans: For each signal, the first row of each example in its arrays and the row after its
            last.
    """

    number: int
    examples: NDArray[np.int64]
    offset: NDArray[np.int64]
    length: NDArray[np.int64]
    slot: NDArray[np.int64]
    tokens: dict[str, NDArray[Any]]
    features: dict[str, dict[str, NDArray[Any]]] = field(default_factory=dict)
    spans: dict[str, NDArray[np.int64]] = field(default_factory=dict)


class StoreReader:
    """A store that is open for reading, with the digests of the requested signals pinned.

    Threads may share it: its caches only grow, and every thread adds equal entries.
    """

    def __init__(self, path: Path, pins: Mapping[str, str] | None = None) -> None:
        """Open the store at `path`.

        Args:
            path: The store's directory.
            pins: The digest that each signal must have, by name. None accepts any.

        Raises:
            IntegrityError: If there is no complete store, or a record does not match its digest.
            IncompatibleError: If the store is of another format or a pinned signal differs.
        """
        self.layout = Layout(path)
        if not self.layout.index.exists():
            raise IntegrityError(
                f"{path}: no complete store is here; run the capture stage first (`decant capture "
                "TEACHER`), or finish the copy with the same `decant copy`"
            )
        self._seen = self._stamp()
        self.index = read_index(self.layout)
        self.plan = read_record(self.layout.plan, path, self.index["plan"])
        check_plan(self.plan, self.layout.plan)
        self._attachments = Attachments(self.layout, self.index, self.plan)
        self.pins = dict(pins or {})
        for signal, digest in self.pins.items():
            self._check_pin(signal, digest)
        self._signals: dict[str, StoredSignal] = {}
        self._checked_rows: set[int] = set()
        self._specs: dict[str, dict[str, ArraySpec]] = {}

    def _check_pin(self, signal: str, digest: str) -> None:
        found = self.index["signals"].get(signal)
        if found is None:
            raise IncompatibleError(
                f"{self.layout.root}: no signal {signal}; it has "
                f"{', '.join(self.signals) or 'none'}; "
                "run the capture stage again (`decant capture TEACHER`)"
            )
        if found["digest"] != digest:
            raise IncompatibleError(
                f"{self.layout.root}: {signal} has digest {found['digest'][:16]}, expected "
                f"{digest[:16]}; the store was captured anew: run the select stage again (`decant "
                "select STUDENT`)"
            )

    def check_pins(self) -> None:
        """Check that the index on disk still lists the pinned signals.

        This costs one `stat`; the index is read again only if it was replaced.

        Raises:
            IncompatibleError: If a pinned signal was withdrawn or has other values.
            IntegrityError: If the store was removed, or its index is altered.
        """
        seen = self._stamp()
        if seen is None:
            raise IntegrityError(
                f"{self.layout.root}: the store was removed while it was read; capture it again, "
                "then run the same command again"
            )
        if seen == self._seen:
            return
        index = read_index(self.layout)
        for name, digest in self.pins.items():
            found = index["signals"].get(name, {}).get("digest")
            if found != digest:
                is_gone = "was withdrawn" if found is None else f"has digest {found[:16]} now"
                first = (
                    "capture stage (`decant capture TEACHER`)"
                    if found is None
                    else "select stage (`decant select STUDENT`)"
                )
                raise IncompatibleError(
                    f"{self.layout.root}: {name} {is_gone}, expected {digest[:16]}: it was "
                    f"rewritten while it was read; run the {first}, then the same command again"
                )
        self._seen = seen

    def _stamp(self) -> tuple[int, ...] | None:
        """Return a stamp that changes when the index is replaced; None if it is missing."""
        try:
            status = self.layout.index.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns

    @property
    def signals(self) -> list[str]:
        """Names of the complete signals."""
        return sorted(self.index["signals"])

    def signal(self, name: str) -> StoredSignal:
        """Return a signal's declaration and receipts, checked against the index.

        Raises:
            IncompatibleError: If the store has no such complete signal, or this software lacks its
                form.
            IntegrityError: If its manifest is altered, or does not cover its segments.
        """
        if name not in self._signals:
            entry = self.index["signals"].get(name)
            if entry is None:
                raise IncompatibleError(
                    f"{self.layout.root}: no signal {name}; it has "
                    f"{', '.join(self.signals) or 'none'}"
                )
            path = self.layout.manifest(name)
            manifest = read_record(path, self.layout.root, entry["manifest"])
            declaration, receipts = of_manifest(manifest, path)
            expected = [s for split in declaration.splits for s in self.segments(split)]
            if (
                declaration.name != name
                or signal_digest(declaration, receipts) != entry["digest"]
                or [receipt.segment for receipt in receipts] != sorted(expected)
            ):
                raise IntegrityError(
                    f"{path}: not the manifest of {name} that the index states; "
                    "run `decant capture TEACHER --verify` to rebuild it"
                )
            self._signals[name] = StoredSignal(
                declaration,
                entry["digest"],
                {receipt.segment: receipt for receipt in receipts},
                manifest.get("software", {}),
            )
        return self._signals[name]

    @cached_property
    def examples(self) -> dict[str, NDArray[Any]]:
        """The columns of the example table by name; `digest` is the identity of each row.

        Raises:
            IntegrityError: If a file is missing or altered, or an example is misplaced.
        """
        count = self.plan["examples"]
        table = {
            name: self._read(
                f"examples/{name}", example_array(array_type, count), 0, self.plan["files"]
            )
            for name, array_type in EXAMPLE_TYPES.items()
        }
        check_table(table, self.plan, self.layout.features / "examples")
        return table

    @cached_property
    def targets(self) -> NDArray[np.float32] | None:
        """Targets of regression or multi-label rows, [examples, outputs]; else None."""
        outputs = self.plan.get("outputs", 0)
        if not outputs:
            return None
        count = self.plan["examples"]
        spec = example_array(target_type(outputs), count)
        return self._read("examples/targets", spec, 0, self.plan["files"])

    @cached_property
    def _ids(self) -> int:
        return count_ids(self.plan, self.teacher_config())

    @property
    def parts(self) -> list[int]:
        """Segments of each part of the training split: the original text, and each addition."""
        return self.plan.get("parts") or [len(self.segments(TRAIN))]

    def segments(self, split: str, parts: int | None = None) -> list[int]:
        """Return the segments of a split, in order.

        Args:
            split: Which split.
            parts: Of the training split, the number of parts from the first; None for all.

        Raises:
            IncompatibleError: If it has fewer parts.
        """
        found = [i for i, name in enumerate(self.plan["segments"]) if name == split]
        if parts is None or split != TRAIN:
            return found
        if parts > len(self.parts):
            raise IncompatibleError(
                f"{self.layout.root}: has {len(self.parts)} parts of training text, expected at "
                f"least {parts}; ask for fewer parts, or add text to corpus.added and capture it"
            )
        return found[: sum(self.parts[:parts])]

    def _read(
        self, array: str, spec: ArraySpec, segment: int, files: Mapping[str, dict[str, int]]
    ) -> NDArray[Any]:
        path = self.layout.features / array
        name = f"{self.layout.features.name}/{array}/{shard_name(segment, spec.array_type)}"
        expected = files.get(name)
        if expected is None:
            raise IntegrityError(f"{path}: segment {segment} is in no receipt; capture it again")
        return read_shard(path, self.layout.root, spec, segment, expected)

    def examples_in(self, segment: int) -> NDArray[np.int64]:
        """Return the positions of a segment's examples in the example table."""
        first, last = np.searchsorted(self.examples["segment"], [segment, segment + 1])
        return np.arange(first, last)

    def read_segment(self, segment: int, signals: Sequence[str] = ()) -> Segment:
        """Read tokens and the given signals of one segment.

        Raises:
            IntegrityError: If a file is missing or altered, or features belong to other rows.
            IncompatibleError: If a signal was not captured for the segment's split.
        """
        chunk, capacity = self.plan["chunk_tokens"], self.plan["segment_tokens"]
        count = len(self.plan["segments"])
        tokens = {
            column: self._read(
                f"tokens/{column}",
                token_array(column, count, capacity, chunk),
                segment,
                self.plan["files"],
            )
            for column in self.plan["columns"]
        }
        members = self.examples_in(segment)
        offset = self.examples["start"][members] - segment * capacity
        length = self.examples["length"][members].astype(np.int64)
        self._check_rows(segment, members, offset, length, tokens)
        identity = rows_digest(self.examples["digest"][members])
        skipped: set[int] = set()
        features, spans = {}, {}
        for name in signals:
            stored = self.signal(name)
            receipt = stored.receipts.get(segment)
            if receipt is None:
                raise IncompatibleError(
                    f"{name}: not captured for split {self.plan['segments'][segment]}; "
                    f"it was for {', '.join(stored.declaration.splits)}"
                )
            if receipt.rows != identity:
                raise IntegrityError(
                    f"{name} segment {segment}: features of other rows ({receipt.rows[:12]}), "
                    f"expected {identity[:12]}; capture this store again"
                )
            declared = stored.declaration
            features[name] = {
                array: self._read(f"{name}/{array}", spec, segment, receipt.files)
                for array, spec in self._arrays(declared).items()
            }
            rows = example_rows(declared.axis, length, declared.rule)
            spans[name] = np.stack([first_rows(rows), np.cumsum(rows)], axis=-1)
            skipped.update(receipt.skipped)
        slot = self.examples["slot"][members].astype(np.int64)
        usable = ~np.isin(slot, sorted(skipped))
        return Segment(
            segment,
            members[usable],
            offset[usable],
            length[usable],
            slot[usable],
            tokens,
            features,
            {name: span[usable] for name, span in spans.items()},
        )

    def _arrays(self, declared: Declaration) -> dict[str, ArraySpec]:
        """Return the arrays of a signal, cached because sizes of pairs depend on all examples."""
        if declared.name not in self._specs:
            count = len(self.plan["segments"])
            extent = segment_extent(
                declared.axis,
                self.plan,
                length=self.examples["length"],
                segment=self.examples["segment"],
                rule=declared.rule,
            )
            self._specs[declared.name] = {
                name: ArraySpec(
                    array_type,
                    count * extent.shard_rows,
                    extent.shard_rows,
                    extent.chunk_rows,
                    declared.axis,
                )
                for name, array_type in declared.arrays().items()
            }
        return self._specs[declared.name]

    def _check_rows(
        self,
        segment: int,
        members: NDArray[np.int64],
        offset: NDArray[np.int64],
        length: NDArray[np.int64],
        tokens: dict[str, NDArray[Any]],
    ) -> None:
        """Compare each example's identity with its tokens and label, once per segment."""
        if segment in self._checked_rows:
            return
        check_ids(tokens["input_ids"], self._ids, f"{self.layout.features}: segment {segment}")
        spans = np.stack([offset, offset + length])
        check_rows(self.examples, self.targets, members, tokens, spans, self.layout.features)
        self._checked_rows.add(segment)

    def channels(self, signal: str) -> Channels | None:
        """Return a signal's channel statistics in float32; None if it has none."""
        declaration = self.signal(signal).declaration
        return self._attachments.channels(declaration)

    def asset(self, name: str) -> Path:
        """Return the path of an asset after checking its file.

        Raises:
            IncompatibleError: If it was not captured.
            IntegrityError: If it is missing or altered.
        """
        return self._attachments.asset(name)

    def teacher_config(self) -> dict[str, Any]:
        """Return the teacher's Hugging Face configuration.

        Raises:
            IntegrityError: If it is missing, altered, or not a JSON object.
        """
        return self._attachments.teacher_config()

    def tokenizer(self) -> Path:
        """Return the directory of the teacher's tokenizer, after checking that it is as captured.

        Raises:
            IntegrityError: If a file is missing, altered, a link, or not listed.
        """
        return self._attachments.tokenizer()

    def copy_tokenizer(self, target: Path) -> None:
        """Write the files of the teacher's tokenizer into a directory, replacing no file.

        Raises:
            IntegrityError: If a file is missing or altered, or its name exists in the directory.
        """
        self._attachments.copy_tokenizer(target)
