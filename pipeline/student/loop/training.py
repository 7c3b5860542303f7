"""The inputs of one student's training: its parameters, its selected signals and this machine."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.runtime import Runtime
from pipeline.student.parameters import StudentParams


@dataclass(frozen=True, kw_only=True)
class Training:
    """Everything that one student's training needs.

    Attributes:
        name: The student's name.
        selected: What the select stage wrote: store, signals with digests, layer maps.
        stores: Directory of stores.
        output: Where the student goes; replaced when training is done.
        curve: CSV of every logged term.
        work: Directory for checkpoints; the same parameters and features continue there.
        student: The section of the student's parameters.
        runtime: This machine.
        before_commit: Called when training is done; if it raises, nothing is exported and the
            checkpoints stay.
    """

    name: str
    selected: Mapping[str, Any]
    stores: Path
    output: Path
    curve: Path
    work: Path
    student: StudentParams
    runtime: Runtime
    before_commit: Callable[[], None] = lambda: None

    @property
    def store(self) -> Path:
        """The store's directory."""
        return self.stores / self.selected["store"]
