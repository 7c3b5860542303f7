"""How a student starts: from an architecture or a checkpoint, and with which weights."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.provenance import file_sha256
from pipeline.section import Positive, Section

Every = Annotated[dict[Literal["every"], Positive], Field(min_length=1)]


class LoraOptions(Section):
    """Low-rank adapters (arXiv 2106.09685) that train in place of the student's own weights.

    Attributes:
        r: Rank of the two matrices that are added to each adapted one.
        alpha: Their product is scaled by alpha / r.
        dropout: Dropout of the adapters' input.
        target_modules: Endings of the names of adapted modules, or `all-linear`: all linear modules
            below the head.
    """

    r: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)] = "all-linear"


class StudentModel(Section):
    """Section `students.S.model`.

    `architecture` holds Hugging Face configuration keys that differ from the teacher's;
    `checkpoint` is a directory, or a hub id with a `revision`, instead. With `init: teacher-layers`
    the student starts with the teacher's `blocks`, counted from 1 (None: spread evenly), which
    capture put into the store's assets; they are cut if the architecture is narrower. With
    `vocabulary: corpus` the student has only the ids that its training rows need.
    """

    architecture: dict[str, Any] | None = None
    checkpoint: str | None = None
    revision: str | None = None
    init: Literal["random", "teacher-layers"] = "random"
    blocks: list[int] | Literal["uniform", "first", "last"] | Every | None = None
    vocabulary: Literal["teacher", "corpus"] = "teacher"
    lora: LoraOptions | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "StudentModel":
        if (self.architecture is None) == (self.checkpoint is None):
            raise ValueError("expected exactly one of architecture and checkpoint")
        if self.checkpoint is not None and self.init != "random":
            raise ValueError("a checkpoint brings its own weights; leave init out")
        if self.checkpoint is None and self.revision is not None:
            raise ValueError("revision is for checkpoint")
        if self.blocks is not None and self.init != "teacher-layers":
            raise ValueError("blocks are for init: teacher-layers")
        if self.lora is not None and self.checkpoint is None and self.init == "random":
            raise ValueError(
                "lora adapts weights that are there: give checkpoint, or init: teacher-layers"
            )
        return self


def checkpoint_digest(checkpoint: str | None) -> dict[str, str]:
    """Return the SHA-256 of each weight and configuration file of a local checkpoint.

    Empty for a hub id, which the revision identifies, and without a checkpoint.
    """
    if checkpoint is None or not Path(checkpoint).is_dir():
        return {}
    files = [*Path(checkpoint).glob("*.safetensors"), Path(checkpoint) / "config.json"]
    return {path.name: file_sha256(path) for path in sorted(files) if path.is_file()}
