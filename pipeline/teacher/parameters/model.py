"""Section `teachers.T.model`: where a teacher comes from."""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import model_validator

from pipeline.section import Section
from pipeline.teacher.source.quantization import Quantization

COMMIT = r"[0-9a-f]{40}"


class QuantizationIn(Section):
    """How a pretrained teacher's matrices are packed when it is loaded."""

    method: Literal["bitsandbytes"] = "bitsandbytes"
    bits: Literal[8, 4]

    def build(self) -> Quantization:
        """Return the library's words for it."""
        return Quantization(self.method, self.bits)


class TeacherModel(Section):
    """Section `teachers.T.model`: a directory or hub id (`path`), or a new model (`scratch`)."""

    path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    scratch: dict[str, Any] | None = None
    quantization: QuantizationIn | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "TeacherModel":
        if (self.path is None) == (self.scratch is None):
            raise ValueError("expected exactly one of path and scratch; add or remove one")
        if self.scratch is not None and "model_type" not in self.scratch:
            raise ValueError("scratch has no model_type; add one, for example llama")
        if self.scratch is not None and self.quantization is not None:
            raise ValueError("quantization is for a pretrained path, not for scratch; remove it")
        if self.path is not None and self.trust_remote_code and not Path(self.path).is_dir():
            self._check_pinned()
        return self

    def _check_pinned(self) -> None:
        """A directory needs no revision: what is in it is taken down by its digest."""
        if self.revision is None:
            raise ValueError("trust_remote_code needs a pinned revision; add model.revision")
        if not re.fullmatch(COMMIT, self.revision):
            raise ValueError(
                f"revision is {self.revision!r}, expected a commit of 40 hexadecimal digits beside "
                "trust_remote_code: a branch or tag may be moved to other code"
            )
