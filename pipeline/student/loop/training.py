"""What training one student takes, from its parameters, its selection and this machine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pipeline.student.align.objective import Objective
from pipeline.student.model.origin import LoraOptions
from pipeline.training.options import TrainOptions


@dataclass(frozen=True, kw_only=True)
class Training:
    """What one student is trained from, and how.

    Attributes:
        name: The student's name.
        selected: What the select stage wrote: store, signals with digests, layer maps.
        stores: Directory of stores.
        output: Where the student goes; replaced when training is done.
        curve: CSV of every logged term.
        work: Directory for checkpoints; the same parameters and features continue there.
        architecture: Configuration keys that differ from the teacher's.
        checkpoint: Directory or hub id to start from instead.
        init: Random weights, or the teacher's blocks from the store's assets.
        objective: The terms of the loss.
        options: The optimisation.
        pool_segments: Segments mixed together in memory.
        gradient_norms: Log the norm of each term's gradient.
        device: A torch device.
        revision: Revision of a hub checkpoint.
        vocabulary: All ids of the teacher, or those that its captured training rows need.
        lora: Adapters that train instead of the weights the student starts with; the export has
            them merged.
        parts: So many of the first parts of the training text: 1 leaves out all that was added to
            the corpus. None for all.
        micro_batch_size: Examples that run at once; 0: the whole batch; `auto`: what fits.
        report_to: Services that are told of each logged step, as `Trainer` names them.
        before_commit: Called when training is done; if it raises, nothing is exported and the
            checkpoints stay.
    """

    name: str
    selected: Mapping[str, Any]
    stores: Path
    output: Path
    curve: Path
    work: Path
    architecture: Mapping[str, Any] | None
    checkpoint: str | None
    init: Literal["random", "teacher-layers"]
    objective: Objective
    options: TrainOptions
    pool_segments: int
    gradient_norms: bool
    device: str
    revision: str | None = None
    vocabulary: Literal["teacher", "corpus"] = "teacher"
    lora: LoraOptions | None = None
    parts: int | None = None
    micro_batch_size: int | Literal["auto"] = 0
    report_to: Sequence[str] = ()
    before_commit: Callable[[], None] = lambda: None

    @property
    def store(self) -> Path:
        """The store's directory."""
        return self.stores / self.selected["store"]
