"""Writes what every signal refers to: `tokens/`, `examples/` and the description of the plan.

The planner runs alone, under the store's lock, before any segment; its record is written last and
lists every file with size and crc32c.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline.axes import SPLITS
from pipeline.errors import IntegrityError
from pipeline.provenance import read_json, write_json
from pipeline.store.forms.form import Part
from pipeline.store.index import read_index, write_index
from pipeline.store.layout import Layout
from pipeline.store.plan import Plan
from pipeline.store.shards import create_array, file_digest, shard_file, shard_writer

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


@dataclass(frozen=True)
class Rows:
    """The tokenised rows that the plan places, in plan order.

    `tokens` holds one array a column for each example; `label` is -1 where there is none.
    """

    tokens: dict[str, list[NDArray[Any]]]
    label: NDArray[np.int64]
    source_row: NDArray[np.int64]
    piece: NDArray[np.int64]


def row_digest(tokens: dict[str, NDArray[Any]], label: int, source_row: int, piece: int) -> bytes:
    """Identity of an example: all its model inputs, its label and where it came from."""
    digest = hashlib.blake2b(digest_size=ROW_DIGEST_BYTES)
    for column in sorted(tokens):
        values = np.ascontiguousarray(tokens[column], dtype=TOKEN_DTYPES[column])
        digest.update(f"{column}:{len(values)};".encode())
        digest.update(values.tobytes())
    digest.update(f"{label};{source_row};{piece}".encode())
    return digest.digest()


def rows_digest(digests: NDArray[np.uint8]) -> str:
    """Identity of a segment: the identities of its examples, in order."""
    return hashlib.blake2b(np.ascontiguousarray(digests).tobytes(), digest_size=16).hexdigest()


def write_plan(layout: Layout, plan: Plan, rows: Rows, description: dict[str, Any]) -> None:
    """Write tokens, examples and the plan's record; what is there and whole already is kept.

    Args:
        layout: The store.
        plan: Where every example lies.
        rows: The examples' tokens and labels, in plan order.
        description: What readers must know: spec, task, classes, vocabulary, chunk_tokens; JSON
            values.
    """
    if layout.plan.exists():
        record = read_json(layout.plan)
        if all(
            file_digest(layout.root / name, layout.root) == entry
            for name, entry in record["files"].items()
            if (layout.root / name).exists()
        ) and all((layout.root / name).exists() for name in record["files"]):
            return
        raise IntegrityError(
            f"{layout.root}: a file of tokens/, examples/ or assets/ is missing or altered; "
            f"delete the "
            "store's directory and capture again"
        )
    layout.root.mkdir(parents=True, exist_ok=True)
    if not (layout.features / "zarr.json").exists():
        zarr.create_group(store=layout.features)
    digests = np.stack(
        [
            np.frombuffer(
                row_digest(
                    {column: values[i] for column, values in rows.tokens.items()},
                    int(rows.label[i]),
                    int(rows.source_row[i]),
                    int(rows.piece[i]),
                ),
                np.uint8,
            )
            for i in range(len(plan.row))
        ]
    )
    written = _write_tokens(layout, plan, rows, description["chunk_tokens"])
    written += _write_examples(layout, plan, rows, digests)
    written += sorted(path for path in layout.assets.rglob("*") if path.is_file())
    files = {str(path.relative_to(layout.root)): file_digest(path, layout.root) for path in written}
    record = {
        **description,
        "segments": [SPLITS[code] for code in plan.segment_split.tolist()],
        "segment_tokens": plan.segment_tokens,
        "examples_per_segment": plan.examples_per_segment,
        "examples": len(plan.row),
        "columns": sorted(rows.tokens),
        "files": files,
    }
    write_json(layout.plan, record)
    write_index(layout, read_index(layout))


def _write_tokens(layout: Layout, plan: Plan, rows: Rows, chunk_tokens: int) -> list[Path]:
    written = []
    with shard_writer(layout.staging, chunk_tokens) as writer:
        for column, values in rows.tokens.items():
            part = Part(TOKEN_DTYPES[column], ())
            array = layout.features / "tokens" / column
            create_array(
                array,
                part,
                rows=plan.segments * plan.segment_tokens,
                shard_rows=plan.segment_tokens,
                chunk_rows=chunk_tokens,
            )
            for segment in range(plan.segments):
                buffer = np.zeros(plan.segment_tokens, dtype=part.dtype)
                examples = plan.in_segment(segment)
                joined = np.concatenate(values[examples])
                buffer[: len(joined)] = joined
                target = shard_file(array, segment, 1)
                writer.write(target, buffer)
                written.append(target)
    return written


def _write_examples(
    layout: Layout, plan: Plan, rows: Rows, digests: NDArray[np.uint8]
) -> list[Path]:
    columns: dict[str, NDArray[Any]] = {
        **{
            key: getattr(plan, key)
            for key in ("split", "row", "start", "length", "segment", "slot")
        },
        "source_row": rows.source_row,
        "piece": rows.piece,
        "label": rows.label,
    }
    arrays = {key: values.astype(EXAMPLE_DTYPES[key]) for key, values in columns.items()}
    arrays["digest"] = digests
    count = len(digests)
    written = []
    with shard_writer(layout.staging, count) as writer:
        for name, values in arrays.items():
            array = layout.features / "examples" / name
            part = Part(str(values.dtype), values.shape[1:])
            create_array(array, part, rows=count, shard_rows=count, chunk_rows=count)
            target = shard_file(array, 0, values.ndim)
            writer.write(target, values)
            written.append(target)
    return written
