"""Selects a student's signals before there is a store.

The manifests that capture would write are written to a scratch directory, and the student selects
its signals from them.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.provenance import write_json
from pipeline.store.layout import BLOCKS
from pipeline.store.signals import Signal, dotted, manifest_record
from pipeline.student.align.needs import select_signals
from pipeline.student.parameters import StudentParams


def rehearse(
    name: str,
    student: StudentParams,
    signals: Sequence[Signal],
    blocks: Sequence[int],
    *,
    depth: int,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the record that the select stage would write for a student.

    Args:
        name: The student's name.
        student: Its section.
        signals: The captured signals.
        blocks: Blocks that are kept for students to start from.
        depth: Blocks of the teacher.
        config: The teacher's configuration.

    Raises:
        ConfigError: If several forms fit and none is named.
        IncompatibleError: If a signal that the student needs is not among them.
    """
    records: dict[str, Any] = {"store": {"store": "", "layers": depth, "config": dict(config)}}
    for signal in signals:
        records[dotted(signal.name)] = manifest_record(signal, "")
    if blocks:
        records[BLOCKS] = {"signal": BLOCKS, "layers": list(blocks), "digest": ""}
    with TemporaryDirectory() as directory:
        for record, values in records.items():
            write_json(Path(directory) / f"{record}.json", values)
        return select_signals(
            Path(directory),
            name=name,
            objective=student.loss,
            align=student.align,
            model=student.model,
        )
