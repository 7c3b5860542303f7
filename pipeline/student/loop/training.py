"""The inputs of one student's training: its parameters, its selected signals and this machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.student.align.objective import Objective
from pipeline.student.model.origin import StudentModel
from pipeline.training.options import TrainOptions


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
        model: How the student starts.
        objective: The terms of the loss.
        options: The optimisation.
        pool_segments: Segments mixed together in memory.
        gradient_norms: Log the norm of each term's gradient.
        device: A torch device.
        parts: So many of the first parts of the training text: 1 leaves out all that was added to
            the corpus. None for all.
        micro_batch_size: Examples that run at once; 0: the whole batch; `auto`: what fits.
        report_to: Services that receive the training curve, by their names in `transformers`.
        before_commit: Called when training is done; if it raises, nothing is exported and the
            checkpoints stay.
    """

    name: str
    selected: Mapping[str, Any]
    stores: Path
    output: Path
    curve: Path
    work: Path
    model: StudentModel
    objective: Objective
    options: TrainOptions
    pool_segments: int
    gradient_norms: bool
    device: str
    parts: int | None = None
    micro_batch_size: int | Literal["auto"] = 0
    report_to: Sequence[str] = ()
    before_commit: Callable[[], None] = lambda: None

    @property
    def store(self) -> Path:
        """The store's directory."""
        return self.stores / self.selected["store"]
