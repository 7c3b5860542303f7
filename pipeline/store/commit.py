"""The commit protocol: declare, write shards, leave receipts, and only then let readers know.

Order on disk: declaration; for each segment its shards, then its receipt; when all receipts are
there the manifest, then the index. A crash between any two steps leaves a store that readers see as
it was before, and that a later capture completes from the receipts.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.axes import SPLITS
from pipeline.errors import IntegrityError
from pipeline.provenance import fingerprint, software
from pipeline.store.extent import example_rows, segment_extent
from pipeline.store.index import index_signal, read_index, withdraw
from pipeline.store.layout import Layout
from pipeline.store.plan import Plan
from pipeline.store.records import Declaration, Receipt, manifest_json
from pipeline.store.sealed import read_record, write_record
from pipeline.store.shards import ArraySpec, create_array, matches, shard_name, write_shard

logger = logging.getLogger(__name__)


def content_digest(parts: Mapping[str, NDArray[Any]], live_rows: int) -> str:
    """Digest of the stored values of a segment in token order, free of padding and compression."""
    digest = hashlib.blake2b(digest_size=32)
    for name in sorted(parts):
        live = np.ascontiguousarray(parts[name][:live_rows])
        digest.update(f"{name}:{live.dtype}:{live.shape};".encode())
        digest.update(live.data)
    return digest.hexdigest()


class SignalWriter:
    """Writes one signal, segment by segment; threads may share it.

    Raises:
        IncompatibleError: If the declaration's form is not of this software.
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
            f"{declared.signal}/{name}": ArraySpec(
                part, plan.segments * self.shard_rows, self.shard_rows, self.chunk_rows
            )
            for name, part in declared.parts().items()
        }

    @property
    def is_stored(self) -> bool:
        """Whether the signal has arrays; else its receipts only join its declaration to rows."""
        return bool(self._specs)

    def example_rows(self, segment: int) -> NDArray[np.int64]:
        """Return how many rows each example of a segment has."""
        return self._rows[self._plan.in_segment(segment)]

    @property
    def segments(self) -> list[int]:
        """The segments that carry this signal."""
        codes = [SPLITS.index(split) for split in self.declared.splits]
        return np.flatnonzero(np.isin(self._plan.segment_split, codes)).tolist()

    def declare(self) -> None:
        """Write array metadata and declaration.

        Receipts left under another declaration are not trusted from here on; a signal that was
        whole under it is withdrawn.
        """
        name = self.declared.signal
        path = self.layout.declaration(name)
        try:
            # As fingerprints: JSON knows no tuple.
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
        """Return zeroed arrays for one segment, a part each."""
        return {
            name: np.zeros((self.shard_rows, *part.row_shape), dtype=part.dtype)
            for name, part in self.declared.parts().items()
        }

    def _shards(self, segment: int) -> dict[str, str]:
        """Return each part's shard as a path within the store."""
        return {
            name.rpartition("/")[2]: f"{self.layout.features.name}/{name}/"
            f"{shard_name(segment, spec.part)}"
            for name, spec in self._specs.items()
        }

    def write_segment(
        self,
        segment: int,
        buffers: Mapping[str, NDArray[Any]],
        *,
        rows: str,
        skipped: tuple[int, ...] = (),
    ) -> Receipt:
        """Make one segment durable and leave its receipt.

        Raises:
            ResourceError: If the file system refuses; earlier segments stay valid.
        """
        examples = self._plan.in_segment(segment)
        tokens = int(self._plan.length[examples].sum())
        count = examples.stop - examples.start
        files = {
            name: write_shard(self.layout, name, buffers[part], self.chunk_rows)
            for part, name in self._shards(segment).items()
        }
        receipt = Receipt(
            segment=segment,
            declaration=self.declared.digest(),
            tokens=tokens,
            examples=count,
            rows=rows,
            content=content_digest(buffers, int(self._rows[examples].sum())),
            skipped=skipped,
            files=files,
        )
        write_record(self.layout.receipt(self.declared.signal, segment), asdict(receipt))
        return receipt

    def receipts(self, *, verify: bool) -> dict[int, Receipt]:
        """Return the receipts that can be trusted, by segment.

        Args:
            verify: Compare each file's size and checksum; else only its existence and size.
        """
        return {
            segment: receipt
            for segment in self.segments
            if (receipt := self._trusted(segment, verify=verify))
        }

    def _trusted(self, segment: int, *, verify: bool) -> Receipt | None:
        receipt = trusted_receipt(self.layout, self.declared.signal, segment, verify)
        if (
            receipt is None
            or receipt.declaration != self.declared.digest()
            or set(receipt.files) != set(self._shards(segment).values())
        ):
            return None
        return receipt

    def missing(self) -> list[int]:
        """Return the segments to capture, after checking every file there is by checksum.

        A whole signal that turns out to be damaged is withdrawn from readers before this returns,
        so that its shards may be written again.
        """
        self._create_arrays()
        trusted = self.receipts(verify=True)
        missing = [segment for segment in self.segments if segment not in trusted]
        name = self.declared.signal
        if missing and name in read_index(self.layout)["signals"]:
            logger.warning("%s: segments %s are damaged; it is withdrawn", name, missing)
            withdraw(self.layout, name)
        return missing

    def commit(self) -> dict[str, Any] | None:
        """Write manifest and index if every receipt is there; return the manifest, else None.

        A signal that is whole already keeps its manifest, and with it the record of the software
        that computed it.
        """
        receipts = self.receipts(verify=False)
        if len(receipts) < len(self.segments):
            return None
        name = self.declared.signal
        manifest = manifest_json(self.declared, list(receipts.values()), software())
        there = self._indexed_manifest()
        if there and fingerprint(there["receipts"]) == fingerprint(manifest["receipts"]):
            return there
        write_record(self.layout.manifest(name), manifest)
        index_signal(self.layout, name, manifest["digest"])
        return manifest

    def _indexed_manifest(self) -> dict[str, Any] | None:
        name = self.declared.signal
        entry = read_index(self.layout)["signals"].get(name)
        try:
            return entry and read_record(
                self.layout.manifest(name), self.layout.root, entry["manifest"]
            )
        except IntegrityError as error:
            logger.warning("the manifest is written again: %s", error)
            return None


def trusted_receipt(layout: Layout, signal: str, segment: int, verify: bool) -> Receipt | None:
    """Return a receipt whose files are there with the right size (and checksum), else None."""
    path = layout.receipt(signal, segment)
    if not path.exists():
        return None
    try:
        receipt = Receipt.from_json(read_record(path, layout.root))
    except IntegrityError as error:
        logger.warning("%s segment %d: %s", signal, segment, error)
        return None
    is_whole = receipt.segment == segment and all(
        matches(layout.root / name, layout.root, entry, verify=verify)
        for name, entry in receipt.files.items()
    )
    return receipt if is_whole else None
