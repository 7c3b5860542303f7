"""How much a capture writes at most, told before the teacher is loaded and again by the teacher.

The first time its sizes are those of its outline on the meta device. What that does not show counts
as nothing, so the first estimate refuses only what the second would.
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
"""Left for records, assets and whatever else the machine does meanwhile."""

RowSizes: TypeAlias = Callable[[Signal], tuple[int, str]]
"""The bytes of one row of a signal before compression, and the rule of its pairs."""


def configured_sizes(
    config: Mapping[str, Any], signals: Sequence[Signal], *, task: str
) -> RowSizes:
    """Return what a teacher's `config.json` says of its signals.

    Pairs are counted as of a causal teacher, which has the fewest. Nothing is told of a teacher
    that brings its own code: that code does not run before it was compared with what was pinned.

    Args:
        config: The configuration as JSON values.
        signals: What will be asked for.
        task: What the teacher's head is for.
    """
    if config.get("auto_map"):
        return _nothing
    try:
        model = outline(known_config(config), task=task, dtype=torch.float32)
        found = measured_sizes(model, outlined_report(model, signals))
    except (ConfigError, IncompatibleError) as error:
        logger.debug("no sizes from the configuration: %s", error)
        return _nothing  # said better once the teacher is there

    def sizes(signal: Signal) -> tuple[int, str]:
        try:
            return found(signal)[0], "causal"
        except IncompatibleError:
            return 0, "causal"

    return sizes


def _nothing(signal: Signal) -> tuple[int, str]:
    return 0, "causal"


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
            "space, or let `decant plan TEACHER --budget SIZE` say what of them fits"
        )
