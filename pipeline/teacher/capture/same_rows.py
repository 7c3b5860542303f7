"""Compare the rows of a store with those of a corpus, and describe the differences.

A row's identity is the digest of its inputs, label and source row. A row that occurs elsewhere in
its split counts as moved; one that occurs nowhere counts as altered or missing.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.corpus.text.examples import SPLITS, Split
from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.store.planner import row_digest
from pipeline.store.reader import StoreReader
from pipeline.teacher.capture.spec import SegmentOptions
from pipeline.teacher.capture.token_rows import plan_rows

ROWS_AT_ONCE = 1000
SHOWN = 5
"""Number of differing rows that are described."""

RowKey = tuple[Split, int]
"""Split and number of a row in the token set."""


@dataclass(frozen=True)
class _Row:
    """Everything that a row's identity is computed from."""

    tokens: dict[str, NDArray[Any]]
    label: int
    source_row: int
    piece: int
    targets: NDArray[np.float32] | None

    def identity(self) -> bytes:
        return row_digest(self.tokens, self.label, self.source_row, self.piece, self.targets)

    def content(self) -> bytes:
        """Return the identity without the source row, which changes if a corpus is reordered."""
        return row_digest(self.tokens, self.label, 0, 0, self.targets)


@dataclass(frozen=True)
class RowsFound:
    """Numbers of equal and differing rows, and descriptions of the first differences.

    `equal` rows have the same number in the corpus, `moved` rows another one. `altered` rows have a
    number that holds another row in the corpus, `missing` rows one that the corpus does not have.
    `added` rows would be captured from this corpus but are not in the store. `lines` describe
    differing settings and the first differing rows, with the values of store and corpus.
    """

    equal: int
    moved: int
    altered: int
    missing: int
    added: int
    lines: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Whether a capture of this corpus would give exactly the store's rows."""
        return not (self.moved or self.altered or self.missing or self.added or self.lines)


def compare_rows(reader: StoreReader, corpus: TokenSet) -> RowsFound:
    """Compare the rows of a store with those of a token set.

    Raises:
        IntegrityError: If rows of the store or of the corpus cannot be read.
    """
    lines = _settings(reader, corpus)
    identities: dict[RowKey, bytes] = {}
    by_content: dict[tuple[Split, bytes], int] = {}
    for (split, number), row in _corpus_rows(corpus):
        identities[split, number] = row.identity()
        by_content.setdefault((split, row.content()), number)
    counts = dict.fromkeys(("equal", "moved", "altered", "missing"), 0)
    stored_keys: set[RowKey] = set()
    shown = 0
    for key, stored in _stored_rows(reader):
        stored_keys.add(key)
        if identities.get(key) == stored.identity():
            counts["equal"] += 1
            continue
        split, number = key
        elsewhere = by_content.get((split, stored.content()))
        if elsewhere is not None and elsewhere != number:
            kind, text = "moved", f"is row {elsewhere} of the corpus"
        elif key not in identities:
            kind, text = "missing", f"is not in the corpus, which has {corpus.meta.rows[split]}"
        else:
            kind = "altered"
            text = _difference(stored, _corpus_row(corpus, key)) if shown < SHOWN else ""
        counts[kind] += 1
        if shown < SHOWN:
            lines.append(f"{split} row {number}: {text}")
            shown += 1
    added = sorted(_planned(reader, corpus) - stored_keys)
    lines += [f"{split} row {row} of the corpus is not in the store" for split, row in added[:1]]
    return RowsFound(**counts, added=len(added), lines=tuple(lines))


def _settings(reader: StoreReader, corpus: TokenSet) -> list[str]:
    """Describe the settings that differ between store and corpus."""
    plan, meta = reader.plan, corpus.meta
    pairs = {
        "tokenizer": (plan["spec"]["tokenizer"][:16], meta.tokenizer_digest[:16]),
        "max_length": (plan["max_length"], meta.max_length),
        "vocab": (plan["vocab"], meta.vocab),
        "task": (plan["task"], meta.task),
        "classes": (list(plan["classes"]), list(meta.classes)),
        "pad_id": (plan["pad_id"], meta.pad_id),
        "parts": (plan["spec"].get("parts", []), list(meta.parts)),
    }
    return [
        _both(f"{key}:", stored, current)
        for key, (stored, current) in pairs.items()
        if stored != current
    ]


def _planned(reader: StoreReader, corpus: TokenSet) -> set[RowKey]:
    plan = plan_rows(corpus, SegmentOptions(**reader.plan["spec"]["segments"]))
    codes, rows = plan.split.tolist(), plan.row.tolist()
    return {(SPLITS[code], row) for code, row in zip(codes, rows, strict=True)}


def _stored_rows(reader: StoreReader) -> Iterator[tuple[RowKey, _Row]]:
    """Yield the store's rows by split, in the order of the token set."""
    table, targets = reader.examples, reader.targets
    for split in SPLITS:
        rows = []
        for number in reader.segments(split):
            segment = reader.read_segment(number)
            for i, first, count in zip(
                segment.examples.tolist(),
                segment.offset.tolist(),
                segment.length.tolist(),
                strict=True,
            ):
                row = _Row(
                    {
                        # A view would keep the complete segment in memory.
                        column: values[first : first + count].copy()
                        for column, values in segment.tokens.items()
                    },
                    int(table["label"][i]),
                    int(table["source_row"][i]),
                    int(table["piece"][i]),
                    None if targets is None else targets[i],
                )
                rows.append(((split, int(table["row"][i])), row))
        yield from sorted(rows, key=lambda pair: pair[0])


def _corpus_rows(corpus: TokenSet) -> Iterator[tuple[RowKey, _Row]]:
    for split in SPLITS:
        for first in range(0, corpus.meta.rows[split], ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, corpus.meta.rows[split])
            for number, row in enumerate(_load(corpus, split, slice(first, last)), first):
                yield (split, number), row


def _corpus_row(corpus: TokenSet, key: RowKey) -> _Row:
    split, number = key
    return _load(corpus, split, slice(number, number + 1))[0]


def _load(corpus: TokenSet, split: Split, numbers: slice) -> list[_Row]:
    columns = ("input_ids", "loss_mask", *corpus.meta.columns)
    table = corpus.split(split)
    present = {*columns, "label", "source_row", "piece", "targets"} & set(table.column_names)
    data = table.select_columns(sorted(present)).with_format("numpy")[numbers]
    count = len(data["source_row"])
    label = data.get("label", np.full(count, -1))
    return [
        _Row(
            {column: np.asarray(data[column][i]) for column in columns},
            int(label[i]),
            int(data["source_row"][i]),
            int(data["piece"][i]),
            np.asarray(data["targets"][i], np.float32) if "targets" in data else None,
        )
        for i in range(count)
    ]


def _difference(stored: _Row, current: _Row) -> str:
    """Describe the first difference between a row of the store and one of the corpus."""
    for key in ("label", "source_row", "piece"):
        ours, theirs = getattr(stored, key), getattr(current, key)
        if ours != theirs:
            return _both(key.replace("_", " "), ours, theirs)
    if not np.array_equal(_numbers(stored), _numbers(current)):
        return _both("targets", _numbers(stored).tolist(), _numbers(current).tolist())
    for column in sorted({*stored.tokens, *current.tokens}):
        ours, theirs = stored.tokens.get(column), current.tokens.get(column)
        if ours is None or theirs is None:
            counts = ("no" if ours is None else "a", "no" if theirs is None else "a")
            return _both(f"column {column}", *counts)
        shorter = min(len(ours), len(theirs))
        differing = np.flatnonzero(ours[:shorter] != theirs[:shorter])
        if len(differing):
            at = int(differing[0])
            return _both(f"{column} from position {at}", int(ours[at]), int(theirs[at]))
        if len(ours) != len(theirs):
            return _both("tokens", len(ours), len(theirs))
    return "differs only in its identity"


def _numbers(row: _Row) -> NDArray[np.float32]:
    return np.zeros(0, np.float32) if row.targets is None else row.targets


def _both(what: str, stored: object, current: object) -> str:
    return f"{what} {stored} in the store, {current} in the corpus"
