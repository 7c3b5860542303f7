"""Checks that the example table of a store is a plan: examples in order, segment by segment.

Tokens are located by `start`, features by the sum of the preceding lengths. A table in which the
two disagree would join rows with the features of other rows, although all checksums are right.
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
    """Compare the place of every example with the place that a plan gives it.

    Args:
        table: The columns of the example table.
        plan: The plan's record, whose types have been checked.
        path: The table, for errors.

    Raises:
        IntegrityError: Naming the first misplaced example and the column.
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
    """Check each example's length and segment, from which the sizes of arrays follow.

    Raises:
        IntegrityError: Naming the first example whose length or segment does not fit the plan.
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
    """Compare the identity of a segment's examples with their tokens, labels and targets.

    Args:
        table: The columns of the example table.
        targets: Targets of regression or multi-label rows, [examples, outputs].
        members: The segment's examples, [members].
        tokens: The segment's columns.
        spans: First token of each member in these columns, and the token after its last,
            [2, members].
        path: The store's arrays, for errors.

    Raises:
        IntegrityError: If an example is another row than the planned one.
    """
    numbers = (table[key][members].tolist() for key in ("label", "source_row", "piece"))
    digests = table["digest"][members].tobytes()
    rows = zip(members.tolist(), *spans.tolist(), *numbers, strict=True)
    for place, (example, start, stop, label, source_row, piece) in enumerate(rows):
        digest = row_digest(
            {column: values[start:stop] for column, values in tokens.items()},
            label,
            source_row,
            piece,
            None if targets is None else targets[example],
        )
        if digest != digests[place * ROW_DIGEST_BYTES : (place + 1) * ROW_DIGEST_BYTES]:
            raise IntegrityError(
                f"{path}: example {example} of segment {int(table['segment'][example])} is not the "
                "row that was planned; the store was altered: delete it and capture again"
            )


def count_ids(plan: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """Return how many ids rows may use: a tokenizer may have gaps, so embedding rows count too.

    Args:
        plan: The plan's record.
        config: The teacher's configuration.
    """
    nested = config.get("text_config")
    configs = [config, nested if isinstance(nested, dict) else {}]
    sizes = [values.get("vocab_size") for values in configs]
    return max(plan["vocab"], *(size for size in sizes if isinstance(size, int)), 0)


def check_ids(ids: NDArray[Any], count: int, where: str) -> None:
    """Refuse ids without a row in the embedding.

    Raises:
        IntegrityError: If an id is too small or too large.
    """
    if ids.min() < 0 or ids.max() >= count:
        wrong = int(ids.min() if ids.min() < 0 else ids.max())
        raise IntegrityError(
            f"{where} has id {wrong}, the teacher {count} ids; delete the store's directory and "
            "capture again"
        )


def planned_digests(layout: Layout) -> NDArray[np.uint8] | None:
    """Return the identity of every row as the planner wrote it; None if it cannot be read."""
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
