"""Takes segments over from another store with the same rows instead of computing them again.

A shard is never changed in place, so two stores may share it by a hard link. Where hard links are
not possible, it is copied. Every byte is checked as when reading; with a hard link, those of the
file that this store will have.
"""

import logging
import os
from dataclasses import replace

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.provenance import refused, write_file
from pipeline.store.commit import WITHIN, SignalWriter, trusted_receipt
from pipeline.store.extent import Extent, segment_extent
from pipeline.store.reader import StoreReader
from pipeline.store.records import Receipt
from pipeline.store.shards import ArraySpec, check_file, matches, read_shard

logger = logging.getLogger(__name__)


def receipts_by_rows(reader: StoreReader, signal: str, declaration: str) -> dict[str, Receipt]:
    """Return the receipts of a signal, complete or not, by the identity of their rows.

    Their files exist with the right sizes; checksums have not been compared.

    Args:
        reader: The store.
        signal: The signal's name.
        declaration: Digest of the declaration under which the receipts must have been written.
    """
    receipts: dict[str, Receipt] = {}
    for number in range(len(reader.plan["segments"])):
        receipt = trusted_receipt(reader.layout, signal, number, verify=False)
        if receipt is not None and receipt.declaration == declaration:
            receipts[receipt.rows] = receipt
    return receipts


class Adoption:
    """Takes segments of one signal from another store, under this store's lock.

    The other store is only read; it may be written or removed at the same time.
    """

    def __init__(self, writer: SignalWriter, reader: StoreReader) -> None:
        """Read how the other store cuts the signal into shards.

        Args:
            writer: Writes the signal in this store.
            reader: The other store, whose declaration of the signal is equal.

        Raises:
            IncompatibleError: If its table of examples would take more memory than readers allow.
            IntegrityError: If its table of examples is missing or altered.
        """
        self._writer = writer
        self._reader = reader
        declared = writer.declared
        extent = segment_extent(
            declared.axis,
            reader.plan,
            length=reader.examples["length"],
            segment=reader.examples["segment"],
            rule=declared.rule,
        )
        self._is_alike = extent == Extent(writer.shard_rows, writer.chunk_rows)
        rows = len(reader.plan["segments"]) * extent.shard_rows
        self._specs = {
            array: ArraySpec(array_type, rows, extent.shard_rows, extent.chunk_rows, declared.axis)
            for array, array_type in declared.arrays().items()
        }

    def take(self, segment: int, receipt: Receipt) -> bool:
        """Take a segment over, durably; return whether that was possible.

        Args:
            segment: The segment of this store.
            receipt: A receipt of the other store, of the same rows.

        Raises:
            ResourceError: If the file system refuses.
        """
        layout = self._writer.layout
        try:
            layout.attempt(WITHIN).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise refused(layout.attempt(WITHIN), error) from error
        try:
            ours = (self._link if self._is_alike else self._encode)(segment, receipt)
        except (IntegrityError, IncompatibleError) as error:
            logger.warning(
                "%s segment %d of store %s is not taken over: %s",
                self._writer.declared.name, receipt.segment, self._reader.layout.root.name, error,
            )  # fmt: skip
            return False
        self._writer.publish_segment(ours, attempt=WITHIN)
        return True

    def _files(self, receipt: Receipt) -> dict[str, str]:
        """Return the path of each array's shard in the other store."""
        shards = self._writer.shards(receipt.segment)
        if set(receipt.files) != set(shards.values()):
            raise IntegrityError(f"its receipt names other files than {', '.join(shards.values())}")
        return shards

    def _link(self, segment: int, receipt: Receipt) -> Receipt:
        """Stage the shards unchanged."""
        files: dict[str, dict[str, int]] = {}
        theirs = self._files(receipt)
        for array, name in self._writer.shards(segment).items():
            entry = files[name] = receipt.files[theirs[array]]
            self._stage(theirs[array], name, entry)
        return replace(receipt, segment=segment, files=files)

    def _stage(self, theirs: str, name: str, entry: dict[str, int]) -> None:
        layout, other = self._writer.layout, self._reader.layout.root
        path, source = layout.staged(WITHIN, name, entry["xxh3"]), other / theirs
        # Also checks that no link of a directory leads out of the other store.
        is_there = matches(source, other, entry, verify=False)
        try:
            # Renaming one hard link onto another of the same file leaves both, so this may exist.
            path.unlink(missing_ok=True)
            if is_there:
                os.link(source, path, follow_symlinks=False)
        except OSError as error:
            logger.debug("%s: no hard link (%s), so it is copied", source, error)
            data = check_file(source, other, entry)
            try:
                write_file(path, data, aside=path.parent)
            except OSError as reason:
                raise refused(path, reason, len(data)) from reason
        if not matches(path, layout.root, entry, verify=True):
            path.unlink(missing_ok=True)
            raise IntegrityError(f"{source}: missing or altered, expected checksum {entry['xxh3']}")

    def _encode(self, segment: int, receipt: Receipt) -> Receipt:
        """Stage the values in shards of another size, which depends on the fullest segment."""
        writer, reader = self._writer, self._reader
        theirs = self._files(receipt)
        buffers = writer.buffers()
        live = int(writer.example_rows(segment).sum())
        for array, spec in self._specs.items():
            path = reader.layout.features / writer.declared.name / array
            entry = receipt.files[theirs[array]]
            if live > spec.shard_rows:
                raise IntegrityError(f"it has {spec.shard_rows} rows, its examples have {live}")
            values = read_shard(path, reader.layout.root, spec, receipt.segment, entry)
            buffers[array][:live] = values[:live]
        staged = writer.stage_segment(
            segment, buffers, rows=receipt.rows, skipped=receipt.skipped, attempt=WITHIN
        )
        if staged.content != receipt.content:
            raise IntegrityError(
                f"its values have digest {staged.content[:16]}, expected {receipt.content[:16]}"
            )
        return staged
