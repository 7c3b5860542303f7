"""The example table of a store must be a plan: rows one after the other, segment by segment.

Tokens are found by `start`, features by the sum of the lengths before: a table in which the two
disagree would join rows with features of others, whatever the checksums say.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.axes import SPLITS
from pipeline.errors import IntegrityError
from pipeline.store.layout import Layout
from pipeline.store.planner import EXAMPLE_TYPES, ROW_DIGEST_BYTES, example_array, row_digest
from pipeline.store.schema import check_plan
from pipeline.store.sealed import read_record
from pipeline.store.shards import read_shard, shard_name


def check_table(table: Mapping[str, NDArray[Any]], plan: Mapping[str, Any], path: Path) -> None:
    """Compare every example's place with where its plan would have put it.

    Args:
        table: The columns of the example table.
        plan: The plan's record, whose types are checked.
        path: The table, for the message.

    Raises:
        IntegrityError: Naming the first example that is out of place, and the column.
    """
    check_lengths(table["length"], table["segment"], plan, path)
    segment, length = table["segment"].astype(np.int64), table["length"].astype(np.int64)
    capacity = plan["segment_tokens"]
    first = np.searchsorted(segment, segment)
    before = np.cumsum(length) - length
    within = before - before[first]
    codes = np.array([SPLITS.index(split) for split in plan["segments"]])
    label = table["label"]
    most = len(plan["classes"]) if plan["task"] == "classification" else None
    for column, is_right in (
        ("length", within + length <= capacity),
        ("start", table["start"] == segment * capacity + within),
        ("slot", table["slot"] == np.arange(len(segment)) - first),
        ("slot", table["slot"] < plan["examples_per_segment"]),
        ("split", table["split"] == codes[segment]),
        ("label", (label >= -1) & (most is None or label < most)),
    ):
        _check(path, column, table[column], is_right)


def check_lengths(
    length: NDArray[np.integer[Any]],
    segment: NDArray[np.integer[Any]],
    plan: Mapping[str, Any],
    path: Path,
) -> None:
    """Check what the sizes of arrays follow from: every example's length and segment.

    Raises:
        IntegrityError: Naming the first example of a length or segment that the plan has not.
    """
    segments, capacity = len(plan["segments"]), plan["segment_tokens"]
    _check(path, "segment", segment, (segment >= 0) & (segment < segments))
    _check(path, "segment", segment, np.diff(segment.astype(np.int64), prepend=0) >= 0)
    _check(path, "length", length, (length >= 1) & (length <= capacity))


def check_rows(
    table: Mapping[str, NDArray[Any]],
    targets: NDArray[np.float32] | None,
    members: NDArray[np.int64],
    tokens: Mapping[str, NDArray[Any]],
    spans: NDArray[np.int64],
    path: Path,
) -> None:
    """Compare the identity of a segment's examples with what their tokens, labels and targets say.

    Args:
        table: The columns of the example table.
        targets: What a regression or multi-label model is asked for, [examples, outputs].
        members: The segment's examples, [members].
        tokens: The segment's columns.
        spans: First token of each member in them, and the one after its last, [2, members].
        path: The store's arrays, for the message.

    Raises:
        IntegrityError: If one is another row.
    """
    numbers = (table[key][members].tolist() for key in ("label", "source_row", "piece"))
    digests = table["digest"][members].tobytes()
    rows = zip(members.tolist(), *spans.tolist(), *numbers, strict=True)
    for place, (example, start, stop, label, source_row, piece) in enumerate(rows):
        found = row_digest(
            {column: values[start:stop] for column, values in tokens.items()},
            label,
            source_row,
            piece,
            None if targets is None else targets[example],
        )
        if found != digests[place * ROW_DIGEST_BYTES : (place + 1) * ROW_DIGEST_BYTES]:
            raise IntegrityError(
                f"{path}: example {example} of segment {int(table['segment'][example])} is not the "
                "row that was planned; the store was altered: delete it and capture again"
            )


def count_ids(plan: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Return how many ids rows may use: a tokenizer may have gaps, so rows of the embedding too.

    Args:
        plan: The plan's record.
        config: The teacher's configuration.
    """
    nested = config.get("text_config")
    places = [config, nested if isinstance(nested, dict) else {}]
    found = [place.get("vocab_size") for place in places]
    return max(plan["vocab"], *(rows for rows in found if isinstance(rows, int)), 0)


def check_ids(ids: NDArray[Any], count: int, where: str) -> None:
    """Refuse ids that no embedding has a row for.

    Raises:
        IntegrityError: Naming the first kind of them, too small or too large.
    """
    if ids.min() < 0 or ids.max() >= count:
        found = int(ids.min() if ids.min() < 0 else ids.max())
        raise IntegrityError(
            f"{where} has id {found}, the teacher {count} ids; delete the store's directory and "
            "capture again"
        )


def planned_digests(layout: Layout) -> NDArray[np.uint8] | None:
    """Return the identity of every row as the planner wrote it; None where that cannot be read."""
    try:
        plan = read_record(layout.plan, layout.root)
        check_plan(plan, layout.plan)
        array, count = layout.features / "examples" / "digest", plan["examples"]
        spec = example_array(EXAMPLE_TYPES["digest"], count)
        name = (array / shard_name(0, spec.array_type)).relative_to(layout.root).as_posix()
        return read_shard(array, layout.root, spec, 0, plan["files"][name])
    except (IntegrityError, KeyError):
        return None


def _check(path: Path, column: str, values: NDArray[Any], is_right: NDArray[np.bool_]) -> None:
    if not is_right.all():
        example = int(np.argmin(is_right))
        raise IntegrityError(
            f"{path}/{column}: {int(values[example])} for example {example}, which is no place or "
            "label of this store's plan; delete the store's directory and capture again"
        )
