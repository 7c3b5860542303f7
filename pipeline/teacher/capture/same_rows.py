"""Are the rows of a store those of a corpus? Row by row, by identity, and what differs in words.

The identity of a row is the digest of all its inputs, label and source row. A row that is found at
another place of its split was moved there; one that is found nowhere was altered or taken out.
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
"""Rows whose difference is said in full."""

Place = tuple[Split, int]
"""Split, and row of the token set within it."""


@dataclass(frozen=True)
class _Row:
    """All that enters a row's identity."""

    tokens: dict[str, NDArray[Any]]
    label: int
    source_row: int
    piece: int
    targets: NDArray[np.float32] | None

    def identity(self) -> bytes:
        return row_digest(self.tokens, self.label, self.source_row, self.piece, self.targets)

    def content(self) -> bytes:
        """The identity without where the row came from, which changes when a corpus is sorted."""
        return row_digest(self.tokens, self.label, 0, 0, self.targets)


@dataclass(frozen=True)
class RowsFound:
    """How many of the store's rows are in the corpus as they are, and what differs.

    `equal` are rows at their place, `moved` those at another one, `altered` those whose place holds
    another row, `missing` those whose place the corpus does not have. `added` are rows that this
    corpus would have captured and the store lacks. `lines` say of the first differing rows, and of
    the settings that differ, what the store and the corpus have.
    """

    equal: int
    moved: int
    altered: int
    missing: int
    added: int
    lines: tuple[str, ...]

    @property
    def is_same(self) -> bool:
        """Whether a capture of this corpus would give the rows that the store has."""
        return not (self.moved or self.altered or self.missing or self.added or self.lines)


def compare_rows(reader: StoreReader, corpus: TokenSet) -> RowsFound:
    """Compare the rows of a store with those of a token set.

    Raises:
        IntegrityError: If rows of the store or of the corpus cannot be read.
    """
    lines = _settings(reader, corpus)
    there: dict[Place, bytes] = {}
    by_content: dict[tuple[Split, bytes], int] = {}
    for (split, row), found in _corpus_rows(corpus):
        there[split, row] = found.identity()
        by_content.setdefault((split, found.content()), row)
    counts = dict.fromkeys(("equal", "moved", "altered", "missing"), 0)
    stored_places: set[Place] = set()
    shown = 0
    for place, stored in _stored_rows(reader):
        stored_places.add(place)
        if there.get(place) == stored.identity():
            counts["equal"] += 1
            continue
        elsewhere = by_content.get((place[0], stored.content()))
        if elsewhere is not None and elsewhere != place[1]:
            kind, said = "moved", f"is row {elsewhere} of the corpus"
        elif place not in there:
            kind, said = "missing", f"is not in the corpus, which has {corpus.meta.rows[place[0]]}"
        else:
            kind = "altered"
            said = _difference(stored, _corpus_row(corpus, place)) if shown < SHOWN else ""
        counts[kind] += 1
        if shown < SHOWN:
            lines.append(f"{place[0]} row {place[1]}: {said}")
            shown += 1
    added = sorted(_planned(reader, corpus) - stored_places)
    lines += [f"{split} row {row} of the corpus is not in the store" for split, row in added[:1]]
    return RowsFound(**counts, added=len(added), lines=tuple(lines))


def _settings(reader: StoreReader, corpus: TokenSet) -> list[str]:
    """Return what the two say of themselves where it differs."""
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
        f"{key}: {stored} in the store, {found} in the corpus"
        for key, (stored, found) in pairs.items()
        if stored != found
    ]


def _planned(reader: StoreReader, corpus: TokenSet) -> set[Place]:
    plan = plan_rows(corpus, SegmentOptions(**reader.plan["spec"]["segments"]))
    codes, rows = plan.split.tolist(), plan.row.tolist()
    return {(SPLITS[code], row) for code, row in zip(codes, rows, strict=True)}


def _stored_rows(reader: StoreReader) -> Iterator[tuple[Place, _Row]]:
    """Yield the store's rows, split by split in the order of their places in the token set."""
    table, targets = reader.examples, reader.targets
    for split in SPLITS:
        found = []
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
                        # Not a view: it would keep the whole segment.
                        column: values[first : first + count].copy()
                        for column, values in segment.tokens.items()
                    },
                    int(table["label"][i]),
                    int(table["source_row"][i]),
                    int(table["piece"][i]),
                    None if targets is None else targets[i],
                )
                found.append(((split, int(table["row"][i])), row))
        yield from sorted(found, key=lambda pair: pair[0])


def _corpus_rows(corpus: TokenSet) -> Iterator[tuple[Place, _Row]]:
    for split in SPLITS:
        for first in range(0, corpus.meta.rows[split], ROWS_AT_ONCE):
            last = min(first + ROWS_AT_ONCE, corpus.meta.rows[split])
            for row, found in enumerate(_load(corpus, split, slice(first, last)), first):
                yield (split, row), found


def _corpus_row(corpus: TokenSet, place: Place) -> _Row:
    return _load(corpus, place[0], slice(place[1], place[1] + 1))[0]


def _load(corpus: TokenSet, split: Any, which: slice) -> list[_Row]:
    columns = ("input_ids", "loss_mask", *corpus.meta.columns)
    table = corpus.split(split)
    wanted = {*columns, "label", "source_row", "piece", "targets"} & set(table.column_names)
    data = table.select_columns(sorted(wanted)).with_format("numpy")[which]
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


def _difference(stored: _Row, found: _Row) -> str:
    """Say in what a row of the store and one of the corpus differ first, with both values."""
    for key in ("label", "source_row", "piece"):
        ours, theirs = getattr(stored, key), getattr(found, key)
        if ours != theirs:
            return _both(key.replace("_", " "), ours, theirs)
    if not np.array_equal(_numbers(stored), _numbers(found)):
        return _both("targets", _numbers(stored).tolist(), _numbers(found).tolist())
    for column in sorted({*stored.tokens, *found.tokens}):
        ours, theirs = stored.tokens.get(column), found.tokens.get(column)
        if ours is None or theirs is None:
            there = ("no" if ours is None else "a", "no" if theirs is None else "a")
            return _both(f"column {column}", *there)
        shorter = min(len(ours), len(theirs))
        differing = np.flatnonzero(ours[:shorter] != theirs[:shorter])
        if len(differing):
            at = int(differing[0])
            return _both(f"{column} from position {at}", int(ours[at]), int(theirs[at]))
        if len(ours) != len(theirs):
            return _both("tokens", len(ours), len(theirs))
    return "differs in its identity alone"


def _numbers(row: _Row) -> NDArray[np.float32]:
    return np.zeros(0, np.float32) if row.targets is None else row.targets


def _both(what: str, stored: object, found: object) -> str:
    return f"{what} {stored} in the store, {found} in the corpus"
