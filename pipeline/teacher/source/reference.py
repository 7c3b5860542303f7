"""The reference to a teacher, `teacher.json`: where its weights are and their digest, no copy.

The teach stage writes it; every later stage identifies the teacher by it, without loading torch.
"""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError, IntegrityError
from pipeline.provenance import file_sha256, fingerprint, read_json, write_json
from pipeline.written_by import remedy

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TeacherReference:
    """Location and identity of a teacher's weights.

    `model` is a hub id or a directory (relative to `teacher.json` if it was trained here).
    `revision` is the revision of a hub id, or the digest of a directory's own code if that may run.
    `layers` is the number of blocks. `config` is the Hugging Face configuration. `made_of` holds
    the digests of the `tokenizer` and the `tokens` that it was trained on here, else None.
    `quantization` says how weights are quantised when they are loaded; None for not at all.
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
            IntegrityError: If it is missing or not a teacher reference.
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
        """Return the reference with an absolute path, for other working directories."""
        if self.trained or not Path(self.model).is_dir():
            return self
        return replace(self, model=str(Path(self.model).absolute()))

    def location(self, directory: Path) -> str:
        """Return the directory or hub id to pass to `from_pretrained`."""
        return str(directory / self.model) if self.trained else self.model

    def identity(self) -> dict[str, Any]:
        """Return the weights and configuration that enter a store's fingerprint, without a path."""
        # The key exists only if there is one, so that stores of other teachers keep their names.
        quantized = {} if self.quantization is None else {"quantization": self.quantization}
        return quantized | {
            "weights_sha256": self.weights_sha256,
            "config": fingerprint(self.config),
            "revision": self.revision if self.trust_remote_code else None,
        }


def weights_sha256(directory: Path) -> str:
    """Return the SHA-256 over the digests of a model's safetensors files, in order of name.

    Raises:
        ConfigError: If there are none; other formats can hold code and are not read.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{directory}: no *.safetensors; expected weights in that format: convert them with "
            "`save_pretrained`"
        )
    joined = "".join(f"{file.name}:{file_sha256(file)}\n" for file in files)
    return hashlib.sha256(joined.encode()).hexdigest()


def teacher_at_hand(teachers: Path, spec: Mapping[str, Any]) -> Path | None:
    """Return the directory below `teachers` with the teacher of a store, or None.

    Args:
        teachers: Directory of teachers, `data/teachers`.
        spec: The JSON that the store's fingerprint is computed from.
    """
    for path in sorted(teachers.glob("*/teacher.json")):
        try:
            if TeacherReference.load(path.parent).identity() == spec.get("teacher"):
                return path.parent
        except IntegrityError as error:
            logger.debug("%s", error)
    return None
