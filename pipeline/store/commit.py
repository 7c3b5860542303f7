"""The commit protocol: declare a signal, write shards and receipts, then publish it to readers.

The order on disk is: the declaration; for each segment its shards, then its receipt; after all
receipts the manifest, then the index. After a crash between any two steps readers see the store as
it was before, and a later capture continues from the receipts.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.axes import SPLITS
from pipeline.errors import IntegrityError
from pipeline.provenance import fingerprint, refused, software, sync_what_is_there
from pipeline.store.extent import example_rows, segment_extent
from pipeline.store.index import index_signal, read_index, withdraw
from pipeline.store.layout import Layout
from pipeline.store.plan import Plan
from pipeline.store.planner import rows_digest
from pipeline.store.records import Declaration, Receipt, manifest_json
from pipeline.store.schema import check_manifest
from pipeline.store.sealed import read_record, write_record
from pipeline.store.shards import (
    ArraySpec,
    create_array,
    matches,
    publish_shards,
    shard_name,
    stage_shard,
)
from pipeline.store.table import planned_digests

logger = logging.getLogger(__name__)
WITHIN = "holder"
"""The attempt in which the holder of the store's lock stages its own shards."""


def content_digest(arrays: Mapping[str, NDArray[Any]], live_rows: int) -> str:
    """Return the digest of a segment's stored values in token order, without padding."""
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(arrays):
        live = np.ascontiguousarray(arrays[name][:live_rows])
        digest.update(f"{name}:{live.dtype}:{live.shape};".encode())
        digest.update(live.data)
    return digest.hexdigest()


class SignalWriter:
    """Writes one signal, segment by segment. Threads may share it.

    Raises:
        IncompatibleError: If a segment would take more memory than readers allow.
    """

    def __init__(
        self, layout: Layout, plan: Plan, chunk_tokens: int, declared: Declaration
    ) -> None:
        self.layout = layout
        self.declared = declared
        self._plan = plan
        room = {
            "segment_tokens": plan.segment_tokens,
            "chunk_tokens": chunk_tokens,
            "examples_per_segment": plan.examples_per_segment,
        }
        extent = segment_extent(
            declared.axis, room, length=plan.length, segment=plan.segment, rule=declared.rule
        )
        self._rows = example_rows(declared.axis, plan.length, declared.rule)
        self.shard_rows, self.chunk_rows = extent.shard_rows, extent.chunk_rows
        self._specs = {
            f"{declared.name}/{name}": ArraySpec(
                array_type,
                plan.segments * self.shard_rows,
                self.shard_rows,
                self.chunk_rows,
                declared.axis,
            )
            for name, array_type in declared.arrays().items()
        }
        for name, spec in self._specs.items():
            spec.check_size(layout.features / name, 0)

    @property
    def is_stored(self) -> bool:
        """Whether the signal has arrays; if not, receipts only tie its declaration to rows."""
        return bool(self._specs)

    def example_rows(self, segment: int) -> NDArray[np.int64]:
        """Return the rows of each example of a segment."""
        return self._rows[self._plan.in_segment(segment)]

    @property
    def segments(self) -> list[int]:
        """The segments that have this signal."""
        codes = [SPLITS.index(split) for split in self.declared.splits]
        return np.flatnonzero(np.isin(self._plan.segment_split, codes)).tolist()

    def declare(self) -> None:
        """Write array metadata and declaration.

        Receipts of an earlier, different declaration are no longer trusted. If the signal was
        complete under it, it is withdrawn.
        """
        name = self.declared.name
        path = self.layout.declaration(name)
        try:
            # Compared as fingerprints, since JSON has no tuples.
            changed = fingerprint(read_record(path, self.layout.root)) != self.declared.digest()
        except IntegrityError:
            changed = True
        if changed:
            if name in read_index(self.layout)["signals"]:
                logger.warning("%s: declared anew, so it is withdrawn", name)
            withdraw(self.layout, name)
            write_record(path, self.declared.to_json())
        self._create_arrays()

    def _create_arrays(self) -> None:
        for name, spec in self._specs.items():
            create_array(self.layout.features, name, spec)

    def buffers(self) -> dict[str, NDArray[Any]]:
        """Return the signal's arrays for one segment, zeroed."""
        return {
            name: np.zeros((self.shard_rows, *array_type.row_shape), dtype=array_type.dtype)
            for name, array_type in self.declared.arrays().items()
        }

    def shards(self, segment: int) -> dict[str, str]:
        """Return the path, within the store, of each array's shard of a segment."""
        return {
            name.rpartition("/")[2]: f"{self.layout.features.name}/{name}/"
            f"{shard_name(segment, spec.array_type)}"
            for name, spec in self._specs.items()
        }

    def stage_segment(
        self,
        segment: int,
        buffers: Mapping[str, NDArray[Any]],
        *,
        rows: str,
        skipped: tuple[int, ...] = (),
        attempt: str,
    ) -> Receipt:
        """Write one segment's shards aside, durably. Any process or thread may call this.

        The segment counts only after `publish_segment`. If the directory of the attempt is missing,
        the attempt is over.

        Raises:
            ResourceError: If the attempt is over, or the file system refuses.
        """
        examples = self._plan.in_segment(segment)
        files = {
            name: stage_shard(self.layout, name, buffers[array], self.chunk_rows, attempt=attempt)
            for array, name in self.shards(segment).items()
        }
        return Receipt(
            segment=segment,
            declaration=self.declared.digest(),
            tokens=int(self._plan.length[examples].sum()),
            examples=examples.stop - examples.start,
            rows=rows,
            content=content_digest(buffers, int(self._rows[examples].sum())),
            skipped=skipped,
            files=files,
        )

    def publish_segment(self, receipt: Receipt, *, attempt: str) -> None:
        """Move a staged segment into place, durably, and write its receipt.

        Only the holder of the store's lock may call this.

        Raises:
            ResourceError: If a staged shard is missing, or the file system refuses.
        """
        path = self.layout.receipt(self.declared.name, receipt.segment)
        # A receipt promises that its shards are durable. An old one refers to other shards: if this
        # process were killed now, the next would trust it for shards that are not synced.
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise refused(path, error) from error
        publish_shards(self.layout, receipt.files, attempt=attempt)
        write_record(path, asdict(receipt))

    def write_segment(
        self,
        segment: int,
        buffers: Mapping[str, NDArray[Any]],
        *,
        rows: str,
        skipped: tuple[int, ...] = (),
    ) -> Receipt:
        """Stage and publish one segment.

        Only the holder of the store's lock may call this, in several threads if need be.

        Raises:
            ResourceError: If the file system refuses; earlier segments stay valid.
        """
        if self.is_stored:
            try:
                self.layout.attempt(WITHIN).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise refused(self.layout.attempt(WITHIN), error) from error
        receipt = self.stage_segment(segment, buffers, rows=rows, skipped=skipped, attempt=WITHIN)
        self.publish_segment(receipt, attempt=WITHIN)
        return receipt

    @cached_property
    def _identities(self) -> list[str]:
        """The identity that each segment's receipt must state; empty before the plan is written.

        A segment of another run, with its receipt, may have been left or copied here.
        """
        digests = planned_digests(self.layout)
        if digests is None or len(digests) != len(self._plan.row):
            return []
        segments = range(self._plan.segments)
        return [rows_digest(digests[self._plan.in_segment(number)]) for number in segments]

    def receipts(self, *, verify: bool) -> dict[int, Receipt]:
        """Return the trusted receipts by segment.

        Args:
            verify: Compare each file's checksum too, not only its existence and size.
        """
        return {
            segment: receipt
            for segment in self.segments
            if (receipt := self._trusted(segment, verify=verify))
        }

    def _trusted(self, segment: int, *, verify: bool) -> Receipt | None:
        receipt = trusted_receipt(self.layout, self.declared.name, segment, verify)
        if (
            receipt is None
            or receipt.declaration != self.declared.digest()
            or (self._identities and receipt.rows != self._identities[segment])
            or set(receipt.files) != set(self.shards(segment).values())
        ):
            return None
        return receipt

    def missing(self) -> list[int]:
        """Return the segments to capture, after checking all existing files by checksum.

        If a complete signal is found to be damaged, it is withdrawn from readers first, so that its
        shards may be written again.
        """
        self._create_arrays()
        trusted = self.receipts(verify=True)
        missing = [segment for segment in self.segments if segment not in trusted]
        name = self.declared.name
        if missing and name in read_index(self.layout)["signals"]:
            logger.warning("%s: segments %s are damaged; it is withdrawn", name, missing)
            withdraw(self.layout, name)
        return missing

    def commit(self) -> dict[str, Any] | None:
        """Write manifest and index if all receipts exist; return the manifest, else None.

        A signal that is complete already keeps its manifest, which records the software that
        computed it.
        """
        receipts = self.receipts(verify=False)
        if len(receipts) < len(self.segments):
            return None
        self._sync_names()
        name = self.declared.name
        manifest = manifest_json(self.declared, list(receipts.values()), software())
        indexed = self._indexed_manifest()
        if indexed and fingerprint(indexed["receipts"]) == fingerprint(manifest["receipts"]):
            return indexed
        write_record(self.layout.manifest(name), manifest)
        index_signal(self.layout, name, manifest["digest"])
        return manifest

    def _sync_names(self) -> None:
        """Make the directories durable that a manifest relies on; those of shards already are."""
        layout = self.layout
        directories = {layout.root, layout.declaration(self.declared.name).parent}
        for name in self._specs:
            array = layout.features / name
            directories.update(p for p in (array, *array.parents) if p.is_relative_to(layout.root))
        if self.declared.channels is not None:
            directories.add(layout.channels(self.declared.kind, self.declared.layer).parent)
        if self.declared.asset_entries:
            directories.update((layout.assets, layout.asset_records))
        sync_what_is_there(directories)

    def _indexed_manifest(self) -> dict[str, Any] | None:
        name = self.declared.name
        entry = read_index(self.layout)["signals"].get(name)
        if entry is None:
            return None
        path = self.layout.manifest(name)
        try:
            manifest = read_record(path, self.layout.root, entry["manifest"])
            check_manifest(manifest, path)
        except IntegrityError as error:
            logger.warning("the manifest is written again: %s", error)
            return None
        return manifest


def trusted_receipt(layout: Layout, signal: str, segment: int, verify: bool) -> Receipt | None:
    """Return a receipt if its files exist with the right size (and checksum), else None."""
    path = layout.receipt(signal, segment)
    if not path.exists():
        return None
    try:
        receipt = Receipt.from_json(read_record(path, layout.root))
    except IntegrityError as error:
        logger.warning("%s segment %d: %s", signal, segment, error)
        return None
    is_complete = receipt.segment == segment and all(
        matches(layout.root / name, layout.root, entry, verify=verify)
        for name, entry in receipt.files.items()
    )
    return receipt if is_complete else None
