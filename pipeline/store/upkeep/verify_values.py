"""The deep half of verifying: shards are decoded and held against what receipts and rows say.

A file that has its checksum can still be wrong if what wrote it was: digests of decoded values, the
identity of every row, and values that are finite are checked as readers would see them.
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
    """Yield the segments whose tokens are not those that their rows' identities state, and why."""
    for number in sorted(segments):
        try:
            reader.read_segment(number)
        except IntegrityError as error:
            yield number, " ".join(str(error).split()).rpartition("; ")[0]


def check_values(reader: StoreReader, name: str, segments: Collection[int]) -> list[Damage]:
    """Return what the decoded values of a signal's segments say against its receipts.

    Raises:
        IncompatibleError: If the signal's form is not of this software.
    """
    found = []
    stored = reader.signal(name)
    for number in sorted(segments):
        reason = _difference(reader, stored, number)
        if reason is not None:
            # The receipt is what vouches for the segment; one without arrays has nothing else.
            receipt = reader.layout.receipt(name, number).relative_to(reader.layout.root)
            files = [*sorted(stored.receipts[number].files), receipt.as_posix()]
            found.append(Damage(files[0], reason, number))
    return found


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
    # A skipped example's rows were never written.
    if any(values[:live][of_skipped].any() for values in arrays.values()):
        return f"values in rows of the skipped slots {sorted(skipped)}"
    form = declared.form
    # An infinite scale is found below, by what it makes of the values.
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
