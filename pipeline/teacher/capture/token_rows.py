"""The token rows of a store: their segment plan, loading them, and single planned segments."""

import numpy as np
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipeline.axes import SPLITS, TRAIN
from pipeline.corpus.text.examples import Split
from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.store.plan import Plan, make_plan
from pipeline.store.planner import Rows
from pipeline.store.reader import Segment
from pipeline.teacher.capture.spec import SegmentOptions


def plan_rows(token_set: TokenSet, options: SegmentOptions) -> Plan:
    """Return the segment plan of a token set's rows.

    Raises:
        ConfigError: If an example is longer than a segment, or there is no training example.
    """
    return make_plan(
        {split: _lengths(token_set, split) for split in SPLITS},
        segment_tokens=options.segment_tokens,
        seed=options.seed,
        fraction=options.fraction,
        limit=options.limit,
        parts=token_set.meta.parts,
    )


def _lengths(token_set: TokenSet, split: Split) -> NDArray[np.int64]:
    column = token_set.split(split).data.column("input_ids")
    return pc.call_function("list_value_length", [column]).to_numpy().astype(np.int64)


def load_rows(token_set: TokenSet, plan: Plan) -> Rows:
    """Load the planned rows, in plan order; a row without label gets -1."""
    columns = ("input_ids", "loss_mask", *token_set.meta.columns)
    tokens: dict[str, list] = {column: [] for column in columns}
    others: dict[str, list] = {"label": [], "source_row": [], "piece": []}
    targets: list[NDArray[np.float32]] = []
    for code, split in enumerate(SPLITS):
        rows = plan.row[plan.split == code]
        if not len(rows):
            continue
        table = token_set.split(split)
        # Columns that only evaluation reads, such as references, are not loaded.
        present = {*columns, *others, "targets"} & set(table.column_names)
        data = table.select_columns(sorted(present)).with_format("numpy")[rows.tolist()]
        for column in columns:
            tokens[column] += list(data[column])
        targets += list(data.get("targets", ()))
        others["label"] += list(data.get("label", np.full(len(rows), -1)))
        others["source_row"] += list(data["source_row"])
        others["piece"] += list(data["piece"])
    arrays = {key: np.asarray(value, dtype=np.int64) for key, value in others.items()}
    stacked = np.stack(targets).astype(np.float32) if targets else None
    return Rows(tokens, **arrays, targets=stacked)


def longest_segment(plan: Plan, rows: Rows) -> Segment:
    """Return the segment with the longest training example, from the plan instead of the store."""
    train = np.flatnonzero(plan.split == SPLITS.index(TRAIN))
    return planned_segment(plan, rows, int(plan.segment[train[np.argmax(plan.length[train])]]))


def planned_segment(plan: Plan, rows: Rows, number: int) -> Segment:
    """Return a segment as a store reader would, from the plan instead of the store."""
    examples = plan.in_segment(number)
    return Segment(
        number,
        examples=np.arange(examples.start, examples.stop),
        offset=plan.start[examples] - number * plan.segment_tokens,
        length=plan.length[examples],
        slot=plan.slot[examples],
        tokens={column: np.concatenate(values[examples]) for column, values in rows.tokens.items()},
    )
