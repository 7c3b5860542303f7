"""What a student starts as: an architecture or a checkpoint, and its first weights."""

from typing import Any, Literal

from pydantic import model_validator

from pipeline.student.objective import Section


class StudentModel(Section):
    """Section `students.S.model`.

    `architecture` holds Hugging Face configuration keys that differ from the teacher's;
    `checkpoint` is a directory or hub id instead. With `init: teacher-layers` the first weights are
    those of the teacher's `blocks`, counted from 1 (None: spread evenly), which capture put into
    the store's assets.
    """

    architecture: dict[str, Any] | None = None
    checkpoint: str | None = None
    init: Literal["random", "teacher-layers"] = "random"
    blocks: list[int] | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "StudentModel":
        if (self.architecture is None) == (self.checkpoint is None):
            raise ValueError("expected exactly one of architecture and checkpoint")
        if self.checkpoint is not None and self.init != "random":
            raise ValueError("a checkpoint brings its own weights; leave init out")
        if self.blocks is not None and self.init != "teacher-layers":
            raise ValueError("blocks are for init: teacher-layers")
        return self
