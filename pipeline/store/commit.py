"""The commit protocol: declare, write shards, leave receipts, and only then let readers know.

Order on disk: declaration; for each segment its shards, then its receipt; when all receipts are
there the manifest, then the index. A crash between any two steps leaves a store that readers see as
it was before, and that a later capture completes from the receipts.
"""

import hashlib
import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.axes import SPLITS, Axis
from pipeline.errors import IntegrityError
from pipeline.provenance import read_json, software, write_json
from pipeline.store.index import index_signal
from pipeline.store.layout import Layout
from pipeline.store.plan import Plan
from pipeline.store.records import Declaration, Receipt, manifest_json
from pipeline.store.shards import ShardWriter, create_array, file_digest, shard_file

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
    """Writes one signal, segment by segment; threads may share it if each has its `ShardWriter`."""

    def __init__(
        self, layout: Layout, plan: Plan, chunk_tokens: int, declared: Declaration
    ) -> None:
        self.layout = layout
        self.declared = declared
        self._plan = plan
        self._parts = declared.parts()
        self._by_token = declared.axis == Axis.TOKEN
        rows = plan.segment_tokens if self._by_token else plan.examples_per_segment
        self.shard_rows = rows
        self.chunk_rows = chunk_tokens if self._by_token else rows

    @property
    def segments(self) -> list[int]:
        """The segments that carry this signal."""
        codes = [SPLITS.index(split) for split in self.declared.splits]
        return np.flatnonzero(np.isin(self._plan.segment_split, codes)).tolist()

    def declare(self) -> None:
        """Write declaration and array metadata; a changed declaration discards old receipts."""
        path = self.layout.receipt(self.declared.signal, 0).parent / "declaration.json"
        if path.exists() and read_json(path) != self.declared.to_json():
            logger.warning("%s: declared anew, its receipts are discarded", self.declared.signal)
            shutil.rmtree(path.parent)
        for name, part in self._parts.items():
            create_array(
                self.layout.array(self.declared.signal, name),
                part,
                rows=self._plan.segments * self.shard_rows,
                shard_rows=self.shard_rows,
                chunk_rows=self.chunk_rows,
            )
        write_json(path, self.declared.to_json())

    def buffers(self) -> dict[str, NDArray[Any]]:
        """Return zeroed arrays for one segment, a part each."""
        return {
            name: np.zeros((self.shard_rows, *part.row_shape), dtype=part.dtype)
            for name, part in self._parts.items()
        }

    def write_segment(
        self,
        writer: ShardWriter,
        segment: int,
        buffers: Mapping[str, NDArray[Any]],
        *,
        rows: str,
        skipped: tuple[int, ...] = (),
    ) -> Receipt:
        """Make one segment durable and leave its receipt."""
        examples = self._plan.in_segment(segment)
        tokens = int(self._plan.length[examples].sum())
        count = examples.stop - examples.start
        files = {}
        for name, values in buffers.items():
            array = self.layout.array(self.declared.signal, name)
            target = shard_file(array, segment, values.ndim)
            files[str(target.relative_to(self.layout.root))] = writer.write(target, values)
        receipt = Receipt(
            segment=segment,
            tokens=tokens,
            examples=count,
            rows=rows,
            content=content_digest(buffers, tokens if self._by_token else count),
            skipped=skipped,
            files=files,
        )
        write_json(self.layout.receipt(self.declared.signal, segment), asdict(receipt))
        return receipt

    def receipts(self, *, verify: bool) -> dict[int, Receipt]:
        """Return the receipts that can be trusted.

        Args:
            verify: Compare each file's size and crc32c; else only its existence and size.
        """
        return {
            segment: receipt
            for segment in self.segments
            if (receipt := trusted_receipt(self.layout, self.declared.signal, segment, verify))
        }

    def commit(self) -> dict[str, Any] | None:
        """Write manifest and index if every receipt is there; return the manifest, else None."""
        receipts = self.receipts(verify=False)
        if len(receipts) < len(self.segments):
            return None
        manifest = manifest_json(self.declared, list(receipts.values()), software())
        write_json(self.layout.manifest(self.declared.signal), manifest)
        index_signal(self.layout, self.declared.signal, manifest["digest"])
        return manifest


def trusted_receipt(layout: Layout, signal: str, segment: int, verify: bool) -> Receipt | None:
    """Return a receipt whose files are there with the right size (and crc32c), else None."""
    path = layout.receipt(signal, segment)
    if not path.exists():
        return None
    try:
        receipt = Receipt.from_json(read_json(path))
        for name, entry in receipt.files.items():
            file = layout.root / name
            if not file.is_file() or file.stat().st_size != entry["bytes"]:
                return None
            if verify and file_digest(file, layout.root) != entry:
                return None
    except IntegrityError as error:
        logger.warning("%s segment %d: %s", signal, segment, error)
        return None
    return receipt
