"""Loads a teacher for inference, or refuses it before anything expensive."""

import logging
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.teacher.reference import TeacherReference

logger = logging.getLogger(__name__)
AUTO_CLASSES = {
    "causal-lm": AutoModelForCausalLM,
    "classification": AutoModelForSequenceClassification,
}


def load_pretrained(
    model: str,
    *,
    task: str,
    revision: str | None,
    trust_remote_code: bool,
    dtype: torch.dtype = torch.float32,
    classes: tuple[str, ...] = (),
) -> PreTrainedModel:
    """Load a pretrained model with the head of a task.

    Raises:
        ConfigError: If it cannot be found or needs remote code that was not asked for.
        IncompatibleError: If the architecture has no such head.
    """
    keywords = {"revision": revision, "trust_remote_code": trust_remote_code}
    if classes:
        names = dict(enumerate(classes))
        keywords |= {
            "num_labels": len(classes),
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
        }
    try:
        return AUTO_CLASSES[task].from_pretrained(
            model, dtype=dtype, use_safetensors=True, **keywords
        )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"teacher {model}: cannot be loaded ({reason}); expected a directory with "
            f"config.json and "
            "safetensors weights, or a hub id in the local cache"
        ) from error
    except ValueError as error:
        reason = str(error).splitlines()[0]
        if "trust_remote_code" in str(error):
            raise ConfigError(
                f"teacher {model}: needs code from its repository; set model.trust_remote_code: "
                f"true and "
                "pin model.revision if you trust it"
            ) from error
        raise IncompatibleError(f"teacher {model}: no {task} model ({reason})") from error


def load_teacher(
    directory: Path,
    reference: TeacherReference,
    *,
    task: str,
    device: torch.device,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """Load the teacher for capture or evaluation: evaluation mode, no gradients, no KV cache."""
    model = load_pretrained(
        reference.location(directory),
        task=task,
        revision=reference.revision,
        trust_remote_code=reference.trust_remote_code,
        dtype=dtype,
    )
    model.config.use_cache = False
    model.to(device)  # pyright: ignore[reportArgumentType]
    return model.eval().requires_grad_(False)


def load_config(model: str, *, revision: str | None, trust_remote_code: bool) -> dict:
    """Return a model's configuration as JSON values, without its weights.

    Raises:
        ConfigError: If it cannot be found.
    """
    try:
        config = AutoConfig.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"teacher {model}: no configuration to be had ({str(error).splitlines()[0]}); "
            f"expected a "
            "directory with config.json, or a hub id in the local cache"
        ) from error
    return config.to_dict()
