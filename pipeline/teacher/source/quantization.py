"""Quantise a teacher to 8 or 4 bits when it is loaded, for teachers that do not fit otherwise.

Quantisation changes the teacher's outputs, so it is part of the teacher's identity. 8 bits are
LLM.int8() (arXiv 2208.07339): the input activations are rounded too, except for outlier channels,
which are determined over a full batch. 4 bits are NF4 (arXiv 2305.14314) and round only weights.
The head and weights tied to it are not quantised.
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
    """Number of bits of a teacher's matrices when it is loaded, and the package that does it."""

    method: Literal["bitsandbytes"]
    bits: Literal[8, 4]

    @classmethod
    def of(cls, record: Mapping[str, Any] | None) -> "Quantization | None":
        """Return the quantisation recorded in a teacher's reference."""
        return None if record is None else cls(**record)

    def require(self, key: str) -> None:
        """Refuse to start if the package is not installed.

        Raises:
            ConfigError: Naming `key` and what to install.
        """
        if find_spec(self.method) is None:
            raise ConfigError(
                f"{key}: {self.method} is not installed, which quantises weights to {self.bits} "
                f"bits; {EXTRA}, or leave quantization out"
            )

    def config(self, dtype: Any) -> Any:
        """Return the `from_pretrained` argument for products in a dtype; 8 bits use float16."""
        # Imported here, because the checks of this module need neither torch nor transformers.
        from transformers import BitsAndBytesConfig

        # It would log for every matrix product that inputs are rounded.
        logging.getLogger(self.method).setLevel(logging.ERROR)
        if self.bits == 8:
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )


def check_quantization(
    quantization: Quantization | None, *, key: str, path: str | None, is_trained: bool
) -> None:
    """Check that a teacher can be quantised, before it is loaded.

    Args:
        quantization: The requested quantisation, or None.
        key: `teachers.T`, for the error.
        path: Directory or hub id of a pretrained teacher; None for one from scratch.
        is_trained: Whether it has a fit section.

    Raises:
        ConfigError: If it is trained here, or the package is not installed.
    """
    if quantization is None:
        return
    if path is None or is_trained:
        other = "a fit section" if path is not None else "model.scratch"
        raise ConfigError(
            f"{key}.model.quantization: given together with {other}, expected a pretrained "
            "teacher that is not trained here; remove one of them (a teacher trained here can be "
            "quantised as the model.path of another one)"
        )
    quantization.require(f"{key}.model.quantization")


def check_stored_quantization(
    config: Mapping[str, Any], quantization: Quantization | None, *, key: str, is_trained: bool
) -> None:
    """Refuse to quantise or train weights that are already quantised in their files.

    Args:
        config: The teacher's `config.json`.
        quantization: The requested quantisation, or None.
        key: `teachers.T`, for the error.
        is_trained: Whether it has a fit section.

    Raises:
        ConfigError: If the weights are quantised and quantisation or training is requested.
    """
    stored = config.get("quantization_config")
    if stored and (quantization is not None or is_trained):
        section = "model.quantization" if quantization is not None else "fit"
        raise ConfigError(
            f"{key}.{section}: given, but the weights are already quantised "
            f"({stored.get('quant_method', 'unknown')}), expected unquantised weights; remove it, "
            "or use the unquantised model"
        )
