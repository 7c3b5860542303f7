"""Writes the arrays that all signals share, `tokens/` and `examples/`, and the plan's record.

The planner runs alone, under the store's lock, before any segment. The plan's record is written
last and lists every file with size and checksum.
"""

import hashlib
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pipeline.axes import SPLITS, Axis
from pipeline.errors import IntegrityError
from pipeline.provenance import sync_what_is_there
from pipeline.store.forms.form import ArrayType
from pipeline.store.index import ensure_index
from pipeline.store.layout import Layout
from pipeline.store.plan import Plan
from pipeline.store.schema import check_plan
from pipeline.store.sealed import read_record, write_record
from pipeline.store.shards import (
    ArraySpec,
    create_array,
    file_digest,
    matches,
    shard_name,
    write_shard,
)

logger = logging.getLogger(__name__)
PLANNED_ASSETS = ("teacher", "tokenizer")
"""Directories in `assets/` that exist before the plan; all other assets come with signals."""
ROW_DIGEST_BYTES = 16
TOKEN_DTYPES = {"input_ids": "int32", "loss_mask": "uint8", "token_type_ids": "uint8"}
EXAMPLE_DTYPES = {
    "split": "uint8",
    "row": "int64",
    "start": "int64",
    "length": "int32",
    "segment": "int32",
    "slot": "int32",
    "source_row": "int64",
    "piece": "int32",
    "label": "int64",
}
EXAMPLE_TYPES = {name: ArrayType(dtype, ()) for name, dtype in EXAMPLE_DTYPES.items()} | {
    "digest": ArrayType("uint8", (ROW_DIGEST_BYTES,), ("byte",))
}
"""The columns of the example table; `targets` is added for rows with numbers."""


def target_type(outputs: int) -> ArrayType:
    """Return the type of the column of the example table that holds each row's numbers."""
    return ArrayType("float32", (outputs,), ("output",))


def example_array(array_type: ArrayType, examples: int) -> ArraySpec:
    """Return a column of the example table, which has one shard."""
    return ArraySpec(array_type, examples, examples, examples, Axis.EXAMPLE)


def token_array(column: str, segments: int, segment_tokens: int, chunk_tokens: int) -> ArraySpec:
    """Return a column of `tokens/`, with one shard a segment."""
    array_type, rows = ArrayType(TOKEN_DTYPES[column], ()), segments * segment_tokens
    return ArraySpec(array_type, rows, segment_tokens, chunk_tokens, Axis.TOKEN)


@dataclass(frozen=True)
class Rows:
    """The tokenised rows of a plan, in plan order.

    Attributes:
        tokens: For each column, an array for each example.
        label: The class of each example, or -1.
        source_row: The row of the corpus file that an example comes from.
        piece: The piece of that row.
        targets: Targets of regression or multi-label rows, [examples, outputs]; else None.
    """

    tokens: dict[str, list[NDArray[Any]]]
    label: NDArray[np.int64]
    source_row: NDArray[np.int64]
    piece: NDArray[np.int64]
    targets: NDArray[np.float32] | None = None

    @cached_property
    def digests(self) -> NDArray[np.uint8]:
        """The identity of every row, [examples, bytes]."""
        count = len(self.label)
        digests = [
            row_digest(
                {column: values[i] for column, values in self.tokens.items()},
                int(self.label[i]),
                int(self.source_row[i]),
                int(self.piece[i]),
                None if self.targets is None else self.targets[i],
            )
            for i in range(count)
        ]
        return np.frombuffer(b"".join(digests), np.uint8).reshape(count, ROW_DIGEST_BYTES)


def row_digest(
    tokens: dict[str, NDArray[Any]],
    label: int,
    source_row: int,
    piece: int,
    targets: NDArray[np.float32] | None = None,
) -> bytes:
    """Return the identity of an example: its model inputs, its label or targets, and its origin.

    Without targets the identity is that of stores from before targets existed.
    """
    digest = hashlib.blake2b(digest_size=ROW_DIGEST_BYTES)
    for column in sorted(tokens):
        values = np.ascontiguousarray(tokens[column], dtype=TOKEN_DTYPES[column])
        digest.update(f"{column}:{len(values)};".encode())
        digest.update(values.data)
    digest.update(f"{label};{source_row};{piece}".encode())
    if targets is not None:
        digest.update(f";targets:{len(targets)};".encode())
        digest.update(np.ascontiguousarray(targets, dtype="<f4").tobytes())
    return digest.digest()


def rows_digest(digests: NDArray[np.uint8]) -> str:
    """Return the identity of a segment, made of the identities of its examples in order."""
    return hashlib.blake2b(np.ascontiguousarray(digests).tobytes(), digest_size=16).hexdigest()


def write_plan(layout: Layout, plan: Plan, rows: Rows, description: dict[str, Any]) -> None:
    """Write tokens, examples and the plan's record, then an index that pins it.

    Intact files are kept; a missing or altered shard is written again, and so is a lost index.

    Args:
        layout: The store.
        plan: The place of every example.
        rows: The examples' tokens and labels, in plan order.
        description: What readers need to know, as JSON values: spec, task, classes, vocabulary and
            chunk_tokens.

    Raises:
        IntegrityError: If an asset that the record lists is missing or altered, or if there is one
            that it does not list.
    """
    record = {
        **description,
        "segments": [SPLITS[code] for code in plan.segment_split.tolist()],
        "segment_tokens": plan.segment_tokens,
        "examples_per_segment": plan.examples_per_segment,
        "examples": len(plan.row),
        "columns": sorted(rows.tokens),
    }
    if rows.targets is not None:
        record["outputs"] = rows.targets.shape[1]
    if len(plan.parts) > 1:
        record["parts"] = list(plan.parts)
    known_plan = _known_plan(layout)
    if known_plan is not None and {key: known_plan[key] for key in record} != record:
        raise IntegrityError(
            f"{layout.plan}: the plan of another corpus or other options; delete the store's "
            "directory and capture again"
        )
    known = {} if known_plan is None else known_plan["files"]
    files: dict[str, dict[str, int]] = {}
    arrays = [
        *_token_arrays(plan, rows, description["chunk_tokens"]),
        *_example_arrays(plan, rows),
    ]
    for array, spec, shards in arrays:
        create_array(layout.features, array, spec)
        for segment, values in enumerate(shards):
            name = f"{layout.features.name}/{array}/{shard_name(segment, spec.array_type)}"
            if name in known and matches(layout.root / name, layout.root, known[name], verify=True):
                files[name] = known[name]
            else:
                files[name] = write_shard(layout, name, values, spec.chunk_rows)
    for directory in PLANNED_ASSETS:
        for path in sorted(p for p in (layout.assets / directory).rglob("*") if p.is_file()):
            name = str(path.relative_to(layout.root))
            if known and name not in known:
                raise IntegrityError(
                    f"{path}: not a file of the {directory} that was captured; remove it, then run "
                    "the same command again"
                )
            files[name] = file_digest(path, layout.root)
    for name, entry in known.items():
        if files.get(name) != entry and name.startswith(layout.assets.name):
            raise IntegrityError(
                f"{layout.root / name}: missing or altered; restore it from the teacher's "
                "directory, or delete the store's directory and capture again"
            )
    _sync(layout, files)
    if known_plan != {**record, "files": files}:
        write_record(layout.plan, {**record, "files": files})
    ensure_index(layout)


def _sync(layout: Layout, files: Iterable[str]) -> None:
    """Make the files that the plan's record lists durable: contents of assets, names of shards."""
    paths = [layout.root / name for name in files]
    assets = {path for path in paths if path.is_relative_to(layout.assets)}
    directories = {parent for path in paths for parent in path.parents}
    sync_what_is_there(assets | {path for path in directories if path.is_relative_to(layout.root)})


def _known_plan(layout: Layout) -> dict[str, Any] | None:
    """Return the plan's record if it exists and is not altered."""
    if not layout.plan.exists():
        return None
    try:
        plan = read_record(layout.plan, layout.root)
        check_plan(plan, layout.plan)
    except IntegrityError as error:
        logger.warning("the plan is written again: %s", error)
        return None
    return plan


Shards: TypeAlias = tuple[str, ArraySpec, Iterable[NDArray[Any]]]
"""The name of an array, its specification, and the values of its shards in order."""


def _token_arrays(plan: Plan, rows: Rows, chunk_tokens: int) -> Iterator[Shards]:
    capacity = plan.segment_tokens

    def shards(column: str) -> Iterator[NDArray[Any]]:
        for segment in range(plan.segments):
            buffer = np.zeros(capacity, dtype=TOKEN_DTYPES[column])
            joined = np.concatenate(rows.tokens[column][plan.in_segment(segment)])
            buffer[: len(joined)] = joined
            yield buffer

    for column in rows.tokens:
        spec = token_array(column, plan.segments, capacity, chunk_tokens)
        yield f"tokens/{column}", spec, shards(column)


def _example_arrays(plan: Plan, rows: Rows) -> Iterator[Shards]:
    count = len(plan.row)
    for name, dtype in EXAMPLE_DTYPES.items():
        values = getattr(rows if name in {"source_row", "piece", "label"} else plan, name)
        spec = example_array(EXAMPLE_TYPES[name], count)
        yield f"examples/{name}", spec, [values.astype(dtype)]
    yield "examples/digest", example_array(EXAMPLE_TYPES["digest"], count), [rows.digests]
    if rows.targets is not None:
        array_type = target_type(rows.targets.shape[1])
        yield "examples/targets", example_array(array_type, count), [rows.targets]
