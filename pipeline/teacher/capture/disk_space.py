"""Upper bound of the bytes a capture writes, computed before and after the teacher is loaded.

Before loading, sizes come from the teacher's outline on the meta device. Unknown sizes count as
zero there, so the early bound refuses nothing that the later one would accept.
"""

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from transformers import PreTrainedModel

from pipeline.axes import SPLITS
from pipeline.errors import ConfigError, IncompatibleError, ResourceError
from pipeline.store.extent import example_rows
from pipeline.store.plan import Plan
from pipeline.store.signals import Signal
from pipeline.taps.check import TapReport
from pipeline.teacher.capture.declare import geometry_of, row_bytes
from pipeline.teacher.capture.outline import known_config, outline, outlined_report
from pipeline.teacher.capture.request import splits_of

logger = logging.getLogger(__name__)

DISK_RESERVE_BYTES = 64 * 2**20
"""Kept free for records, assets and other programs."""

RowSizes: TypeAlias = Callable[[Signal], tuple[int, str]]
"""Function that returns the bytes of one row of a signal before compression, and its pair rule."""


def configured_sizes(
    config: Mapping[str, Any], signals: Sequence[Signal], *, task: str
) -> RowSizes:
    """Return row sizes that follow from a teacher's `config.json`.

    Pairs are counted for a causal teacher, which has the fewest. For a teacher with its own code
    all sizes are zero, because that code must not run before its digest is checked.

    Args:
        config: The configuration as JSON values.
        signals: The signals whose sizes will be requested.
        task: The task of the teacher's head.
    """
    if config.get("auto_map"):
        return _zero_sizes
    try:
        model = outline(known_config(config), task=task, dtype=torch.float32)
        outlined = measured_sizes(model, outlined_report(model, signals))
    except (ConfigError, IncompatibleError) as error:
        logger.debug("no sizes from the configuration: %s", error)
        return _zero_sizes  # loading the teacher gives a better error

    def sizes(signal: Signal) -> tuple[int, str]:
        try:
            return outlined(signal)[0], "causal"
        except IncompatibleError:
            return 0, "causal"

    return sizes


def _zero_sizes(signal: Signal) -> tuple[int, str]:
    return 0, "causal"


def measured_sizes(model: PreTrainedModel, report: TapReport) -> RowSizes:
    """Return row sizes that the loaded teacher and its tap report give."""

    def sizes(signal: Signal) -> tuple[int, str]:
        rule = "causal" if signal.layer is None else report.rule.get(signal.layer, "causal")
        return row_bytes(signal, geometry_of(signal, model, report)), rule

    return sizes


def needed_bytes(
    plan: Plan, signals: Sequence[Signal], missing: Mapping[str, Sequence[int]], sizes: RowSizes
) -> int:
    """Return the bytes to write if nothing compresses.

    Args:
        plan: The store's segment plan.
        signals: The requested signals.
        missing: The missing segments by signal; a signal without an entry lacks all of them.
        sizes: Row sizes of the signals.
    """
    needed = 0
    for signal in signals:
        codes = [SPLITS.index(split) for split in splits_of(signal)]
        every = np.flatnonzero(np.isin(plan.segment_split, codes))
        is_missing = np.isin(plan.segment, missing.get(signal.name, every))
        size, rule = sizes(signal)
        needed += int(example_rows(signal.form.axis, plan.length[is_missing], rule).sum()) * size
    return needed


def require_space(root: Path, needed: int) -> None:
    """Refuse a capture that does not fit on the disk.

    Raises:
        ResourceError: With the free and the needed bytes, including the reserve.
    """
    free, needed = shutil.disk_usage(root).free, needed + DISK_RESERVE_BYTES
    if needed > free:
        raise ResourceError(
            f"{root}: {free:,} bytes free, the missing features need up to {needed:,} bytes; free "
            "space, or let `decant plan TEACHER --budget SIZE` choose what fits"
        )
