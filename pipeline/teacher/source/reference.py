"""Which teacher: a reference to weights that stay where they are, never a copy of them.

`teach` writes it as `teacher.json`; every later stage identifies the teacher by it, without loading
torch.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import IntegrityError
from pipeline.provenance import fingerprint, read_json, write_json
from pipeline.written_by import remedy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherReference:
    """Where a teacher's weights are and what they are.

    `model` is a hub id, or a directory (relative to `teacher.json` when it was trained here).
    `revision` is that of a hub id; of a directory whose code may run, the digest of that code.
    `layers` is its depth in blocks. `config` is the Hugging Face configuration. `made_of` has the
    digests of the `tokenizer` and the `tokens` that it was trained on here; None where it was not.
    `quantization` says how weights are packed when they are loaded; None where they stay as stored.
    """

    model: str
    revision: str | None
    trust_remote_code: bool
    weights_sha256: str
    layers: int
    config: dict[str, Any]
    trained: bool
    made_of: dict[str, str] | None = None
    quantization: dict[str, Any] | None = None

    @classmethod
    def load(cls, directory: Path) -> "TeacherReference":
        """Read `teacher.json` of a teacher's directory.

        Raises:
            IntegrityError: If it is missing or not a teacher's reference.
        """
        try:
            return cls(**read_json(directory / "teacher.json"))
        except TypeError as error:
            raise IntegrityError(
                f"{directory / 'teacher.json'}: {error}; {remedy(directory)}"
            ) from error

    def save(self, directory: Path) -> None:
        """Write `teacher.json` into `directory`."""
        write_json(directory / "teacher.json", asdict(self))

    def anywhere(self) -> "TeacherReference":
        """Return the same for a process with another working directory."""
        if self.trained or not Path(self.model).is_dir():
            return self
        return replace(self, model=str(Path(self.model).absolute()))

    def location(self, directory: Path) -> str:
        """Return what `from_pretrained` takes: a directory or a hub id."""
        return str(directory / self.model) if self.trained else self.model

    def identity(self) -> dict[str, Any]:
        """Return what enters a store's fingerprint: weights and configuration, not their place."""
        # Only where there is one: stores of teachers as they are keep their names.
        packed = {} if self.quantization is None else {"quantization": self.quantization}
        return packed | {
            "weights_sha256": self.weights_sha256,
            "config": fingerprint(self.config),
            "revision": self.revision if self.trust_remote_code else None,
        }


def teacher_at_hand(teachers: Path, spec: Mapping[str, Any]) -> Path | None:
    """Return the directory below `teachers` that describes the teacher of a store, or None.

    Args:
        teachers: Directory of teachers, `data/teachers`.
        spec: What the store's fingerprint is taken of.
    """
    for path in sorted(teachers.glob("*/teacher.json")):
        try:
            if TeacherReference.load(path.parent).identity() == spec.get("teacher"):
                return path.parent
        except IntegrityError as error:
            logger.debug("%s", error)
    return None
