"""Identity of weights: a digest of the safetensors files, whatever directory they are in."""

import hashlib
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.provenance import file_sha256


def weights_sha256(directory: Path) -> str:
    """Return the SHA-256 over the digests of a model's safetensors files, in order of name.

    Raises:
        ConfigError: If there is none; other formats can hold code and are not read.
    """
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ConfigError(
            f"{directory}: no *.safetensors; expected weights in that format: convert them with "
            "`save_pretrained`"
        )
    joined = "".join(f"{file.name}:{file_sha256(file)}\n" for file in files)
    return hashlib.sha256(joined.encode()).hexdigest()
