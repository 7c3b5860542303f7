"""Weights in eight or four bits: what no longer fits in bfloat16 may still teach.

It changes what the teacher says, so it is part of the teacher's identity. Eight bits are
LLM.int8() (arXiv 2208.07339): what a matrix reads is rounded too, but for channels of outliers,
which are those of a whole batch. Four bits are NF4 (arXiv 2305.14314), for the weights alone. The
head and what is tied to it stay as they are.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal

from pipeline.errors import ConfigError

EXTRA = 'install the extra "quantized" (pip install "decant-kd[quantized]")'


@dataclass(frozen=True)
class Quantization:
    """How a teacher's matrices are packed when it is loaded, and by which package."""

    method: Literal["bitsandbytes"]
    bits: Literal[8, 4]

    @classmethod
    def of(cls, found: Mapping[str, Any] | None) -> "Quantization | None":
        """Return what a teacher's reference says of it."""
        return None if found is None else cls(**found)

    def require(self, key: str) -> None:
        """Refuse to begin without the package.

        Raises:
            ConfigError: Naming `key` and what to install.
        """
        if find_spec(self.method) is None:
            raise ConfigError(
                f"{key}: {self.method} is not installed, which packs weights in {self.bits} bits; "
                f"{EXTRA}, or leave quantization out"
            )

    def config(self, dtype: Any) -> Any:
        """Return what `from_pretrained` takes, given the dtype of products; 8 bits use float16."""
        # Not above: whoever asks whether the package is there needs neither torch nor transformers.
        from transformers import BitsAndBytesConfig

        # It says of every product of every batch that its inputs are rounded.
        logging.getLogger(self.method).setLevel(logging.ERROR)
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )


def check_quantization(
    quantization: Quantization | None, *, key: str, path: str | None, is_trained: bool
) -> None:
    """See that a teacher can be quantised, before anything of it is loaded.

    Args:
        quantization: What is asked for; None asks for nothing.
        key: `teachers.T`, for the error.
        path: Directory or hub id of a pretrained teacher; None for one from scratch.
        is_trained: Whether it has a fit section.

    Raises:
        ConfigError: If it is trained here, or the package is not installed.
    """
    if quantization is None:
        return
    if path is None or is_trained:
        found = "a fit section" if path is not None else "model.scratch"
        raise ConfigError(
            f"{key}.model.quantization: found beside {found}, expected a pretrained teacher that "
            "is not trained here; remove one of them (a teacher trained here can be quantised as "
            "the model.path of another one)"
        )
    quantization.require(f"{key}.model.quantization")


def check_packed(
    config: Mapping[str, Any], quantization: Quantization | None, *, key: str, is_trained: bool
) -> None:
    """Weights that are packed in their files can be packed no further, nor trained.

    Args:
        config: The teacher's `config.json`.
        quantization: What is asked for.
        key: `teachers.T`, for the error.
        is_trained: Whether it has a fit section.

    Raises:
        ConfigError: If they are packed and one of it is asked.
    """
    packed = config.get("quantization_config")
    if packed and (quantization is not None or is_trained):
        place = "model.quantization" if quantization is not None else "fit"
        raise ConfigError(
            f"{key}.{place}: given, and the weights are quantised already "
            f"({packed.get('quant_method', 'unknown')}), expected plain ones; remove it, or take "
            "the unquantised model"
        )
