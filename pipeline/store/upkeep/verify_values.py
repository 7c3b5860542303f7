"""Deep verification: decodes shards and compares them with receipts and rows.

A file with the right checksum can still be wrong if its writer was. So digests of decoded values,
the identity of every row, and finiteness are checked as readers would see them.
"""

from collections.abc import Collection, Iterator

import numpy as np

from pipeline.errors import IntegrityError
from pipeline.store.commit import content_digest
from pipeline.store.extent import example_rows
from pipeline.store.reader import StoreReader
from pipeline.store.records import StoredSignal
from pipeline.store.upkeep.findings import Damage


def check_rows(reader: StoreReader, segments: Collection[int]) -> Iterator[tuple[int, str]]:
    """Yield the segments whose tokens do not match the identities of their rows, with reasons."""
    for number in sorted(segments):
        try:
            reader.read_segment(number)
        except IntegrityError as error:
            yield number, " ".join(str(error).split()).rpartition("; ")[0]


def check_values(reader: StoreReader, name: str, segments: Collection[int]) -> list[Damage]:
    """Return the damage found by comparing decoded values of segments with their receipts.

    Raises:
        IncompatibleError: If this software lacks the signal's form.
    """
    damage = []
    stored = reader.signal(name)
    for number in sorted(segments):
        reason = _difference(reader, stored, number)
        if reason is not None:
            # The receipt vouches for the segment; a signal without arrays has nothing else.
            receipt = reader.layout.receipt(name, number).relative_to(reader.layout.root)
            files = [*sorted(stored.receipts[number].files), receipt.as_posix()]
            damage.append(Damage(files[0], reason, number))
    return damage


def _difference(reader: StoreReader, stored: StoredSignal, number: int) -> str | None:
    declared, receipt = stored.declaration, stored.receipts[number]
    name = declared.name
    try:
        segment = reader.read_segment(number, [name])
    except IntegrityError as error:
        return " ".join(str(error).split()).rpartition("; ")[0]
    members = reader.examples_in(number)
    counts = example_rows(declared.axis, reader.examples["length"][members], declared.rule)
    arrays, live = segment.features[name], int(counts.sum())
    if (content := content_digest(arrays, live)) != receipt.content:
        return f"content digest {content[:16]}, expected {receipt.content[:16]}"
    skipped = set(receipt.skipped)
    if unknown := sorted(skipped - set(range(len(members)))):
        return f"skipped slots {unknown}, of {len(members)} that it has"
    owners = np.repeat(np.arange(len(members)), counts)
    of_skipped = np.isin(owners, sorted(skipped))
    # Rows of skipped examples are never written.
    if any(values[:live][of_skipped].any() for values in arrays.values()):
        return f"values in rows of the skipped slots {sorted(skipped)}"
    form = declared.form
    # An infinite scale is found below by the values that it gives.
    with np.errstate(invalid="ignore", over="ignore"):
        decoded = form.decode(
            {array: values[:live] for array, values in arrays.items()}, reader.channels(name)
        )
    finite = np.ones(live, dtype=bool)
    for values in decoded.values():
        if values.dtype.kind == "f":
            finite &= np.isfinite(values).reshape(live, -1).all(-1)
    if not finite.all():
        slots = np.unique(owners[~finite]).tolist()
        return f"values that are not finite in slots {slots}, which are not listed as skipped"
    return None
