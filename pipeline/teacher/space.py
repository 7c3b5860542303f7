"""How much a capture writes at most, told before the teacher is loaded and again by the teacher.

A configuration says sizes by its family's names for them. What it does not say counts as nothing
here, so the first estimate refuses only what the second would.
"""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from transformers import PreTrainedModel

from pipeline.axes import SPLITS
from pipeline.errors import IncompatibleError, ResourceError
from pipeline.store.extent import example_rows
from pipeline.store.forms.form import Geometry
from pipeline.store.plan import Plan
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport
from pipeline.teacher.declare import geometry_of, row_bytes
from pipeline.teacher.request import splits_of

DISK_RESERVE_BYTES = 64 * 2**20
"""Left for records, assets and whatever else the machine does meanwhile."""
WIDTHS = ("hidden_size", "n_embd", "d_model", "dim")
HEADS = ("num_attention_heads", "n_head", "n_heads")

RowSizes: TypeAlias = Callable[[Signal], tuple[int, str]]
"""The bytes of one row of a signal before compression, and the rule of its pairs."""


def configured_sizes(config: Mapping[str, Any]) -> RowSizes:
    """Return what a teacher's `config.json` says of its signals."""
    text = config.get("text_config") or config
    width, heads = _size(text, *WIDTHS), _size(text, *HEADS)
    geometry = {
        "heads": heads,
        "kv_heads": _size(text, "num_key_value_heads") or heads,
        "d_head": _size(text, "head_dim") or (width // heads if heads else 0),
    }

    def sizes(signal: Signal) -> tuple[int, str]:
        classes = len(config.get("id2label") or ()) or _size(config, "num_labels")
        vocab = classes if signal.form.name == "dense" else _size(text, "vocab_size")
        try:
            found = row_bytes(signal, Geometry(width=width, vocab=vocab, **geometry))
        except IncompatibleError:
            return 0, "causal"  # said better once the teacher is there
        return found, "causal"

    return sizes


def _size(config: Mapping[str, Any], *names: str) -> int:
    """Return the first of these keys that is a number, else 0."""
    return next((n for name in names if isinstance(n := config.get(name), int) and n > 0), 0)


def measured_sizes(model: PreTrainedModel, report: TapReport) -> RowSizes:
    """Return the sizes that the loaded teacher has."""

    def sizes(signal: Signal) -> tuple[int, str]:
        rule = "causal" if signal.layer is None else report.rule.get(signal.layer, "causal")
        return row_bytes(signal, geometry_of(signal, model, report)), rule

    return sizes


def needed_bytes(
    plan: Plan, signals: Sequence[Signal], missing: Mapping[str, Sequence[int]], sizes: RowSizes
) -> int:
    """Return what is written at most, even if nothing compresses.

    Args:
        plan: The store's plan.
        signals: What is asked for.
        missing: The segments that a signal lacks; all of them for one that is not named.
        sizes: Of the signals' rows.
    """
    needed = 0
    for signal in signals:
        codes = [SPLITS.index(split) for split in splits_of(signal)]
        every = np.flatnonzero(np.isin(plan.segment_split, codes))
        here = np.isin(plan.segment, missing.get(signal.name, every))
        size, rule = sizes(signal)
        needed += int(example_rows(signal.form.axis, plan.length[here], rule).sum()) * size
    return needed


def require_space(root: Path, needed: int) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        ResourceError: With the bytes that are free and those needed, the reserve included.
    """
    free, needed = shutil.disk_usage(root).free, needed + DISK_RESERVE_BYTES
    if needed > free:
        raise ResourceError(
            f"{root}: {free:,} bytes free, the missing features need up to {needed:,} bytes; free "
            "space, capture fewer layers, or a smaller fraction"
        )
