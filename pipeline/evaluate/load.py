"""Loads a student for evaluation from a plain Hugging Face directory."""

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from pipeline.errors import IntegrityError
from pipeline.tasks import models_language
from pipeline.written_by import remedy


def load_student(
    directory: Path, *, task: str, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """Load a student in evaluation mode.

    Raises:
        IntegrityError: If the directory is not a complete model.
    """
    if not directory.is_dir():
        raise IntegrityError(f"{directory}: no whole student, it is missing; {remedy(directory)}")
    kind = AutoModelForCausalLM if models_language(task) else AutoModelForSequenceClassification
    try:
        model = kind.from_pretrained(
            directory, local_files_only=True, use_safetensors=True, dtype=dtype
        )
    except (OSError, ValueError) as error:
        raise IntegrityError(
            f"{directory}: no whole student ({str(error).splitlines()[0]}); {remedy(directory)}"
        ) from error
    return model.eval()
