"""Load a teacher for inference, or refuse it before anything expensive."""

import logging
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from pipeline.errors import (
    ConfigError,
    IncompatibleError,
    ResourceError,
    in_short,
    is_out_of_memory,
)
from pipeline.taps.configuration import auto_class
from pipeline.tasks import models_language, outputs_of
from pipeline.teacher.source.placement import Placement, remove_with
from pipeline.teacher.source.quantization import Quantization
from pipeline.teacher.source.reference import TeacherReference, weights_sha256
from pipeline.training.generators import forked_generators
from pipeline.training.own_code import code_sha256, own_code
from pipeline.written_by import remedy

logger = logging.getLogger(__name__)
_LOADING = threading.Lock()
"""transformers patches its classes while loading; two threads at once would leave the patches."""
SIZE_MISMATCH = "ignore_mismatched_sizes"
"""Text in transformers' error about weights whose shapes differ from the configuration."""
PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
"""Problem type, which selects the loss of a transformers sequence classifier, by task."""


def head_options(task: str, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return the configuration keys of a new head: number and names of outputs, and loss."""
    if models_language(task):
        return {}
    names = dict(enumerate(classes or ("score",)))
    return {
        "num_labels": outputs_of(task, classes),
        "id2label": names,
        "label2id": {name: i for i, name in names.items()},
        "problem_type": PROBLEM_TYPES[task],
    }


def load_pretrained(
    model: str,
    *,
    task: str,
    revision: str | None,
    trust_remote_code: bool,
    dtype: torch.dtype = torch.float32,
    classes: tuple[str, ...] = (),
    new_head: bool = False,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """Load a pretrained model with the head of a task, each weight once and in its dtype.

    Args:
        model: A directory or a hub id.
        task: The task of the head.
        revision: Revision of a hub id.
        trust_remote_code: Run code from the model's repository.
        dtype: Dtype of the weights.
        classes: Names of the classes; the head has one output per class.
        new_head: Initialise the head at random if the stored one has another size.
        seed: Seed for weights that are not on disk.
        options: Further arguments of `from_pretrained`, such as the device map.

    Raises:
        ConfigError: If it cannot be found, needs remote code that is not allowed or a package that
            is not installed, or does not fit the device map.
        IncompatibleError: If the architecture has no such head.
        ResourceError: If the weights do not fit into memory.
    """
    if not trust_remote_code and own_code(model, revision):
        raise _needs_code(model)  # code may have been added after the teach stage
    keywords: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if classes and not new_head:
        names = dict(enumerate(classes))
        keywords |= {"num_labels": len(classes), "id2label": names}
        keywords["label2id"] = {name: i for i, name in names.items()}
    try:
        with _LOADING, forked_generators():
            torch.manual_seed(seed)
            if new_head and not models_language(task):
                # A checkpoint of another task has that task's loss and number of classes, which
                # cannot be changed while the configuration is loaded: replace them after.
                config = AutoConfig.from_pretrained(model, **keywords)
                for key, value in head_options(task, classes).items():
                    setattr(config, key, value)
                keywords["config"] = config
            loaded, info = auto_class(task).from_pretrained(
                model,
                dtype=dtype,
                use_safetensors=True,
                ignore_mismatched_sizes=new_head,
                output_loading_info=True,
                **keywords,
                **(options or {}),
            )
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"teacher {model}: cannot be loaded ({reason}); expected a directory with config.json "
            "and safetensors weights, or a hub id in the local cache"
        ) from error
    except ImportError as error:
        raise ConfigError(
            f"teacher {model}: needs a package that is not installed ({in_short(error)}); install "
            "it, or use another model"
        ) from error
    except ValueError as error:
        reason = str(error).splitlines()[0]
        if "trust_remote_code" in str(error):
            raise _needs_code(model) from error
        _refuse_device_map(error, options)
        raise IncompatibleError(f"teacher {model}: no {task} model ({reason})") from error
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise ResourceError(
                f"teacher {model}: its weights do not fit into memory ({in_short(error)}); set "
                "device_map: auto in runtime.yaml, a narrower dtype (of capture, evaluate or "
                "tokens.generation) or quantization"
            ) from error
        if SIZE_MISMATCH not in str(error):
            _refuse_device_map(error, options)
        raise IncompatibleError(
            f"teacher {model}: its weights have other shapes than its configuration says "
            f"({in_short(error)}); expected a directory written by save_pretrained"
        ) from error
    if not new_head:
        _refuse_missing(model, task, info["missing_keys"])
    return loaded


def _refuse_device_map(error: Exception, options: Mapping[str, Any] | None) -> None:
    """Raise if there is a device map: then that does not fit the model or the machine."""
    device_map = (options or {}).get("device_map")
    # A single device was already checked.
    if isinstance(device_map, str) or (device_map and "" not in device_map):
        raise ConfigError(
            f"runtime device_map {device_map}: {in_short(error)}; expected a device of this "
            "machine, cpu or disk for every module, or auto"
        ) from error


def _needs_code(model: str) -> ConfigError:
    return ConfigError(
        f"teacher {model}: needs code from its repository; set model.trust_remote_code: true and "
        "pin model.revision (a directory needs none) if you trust it"
    )


def _refuse_missing(model: str, task: str, missing: Collection[str]) -> None:
    """Refuse missing weights, which transformers would silently initialise at random."""
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise IncompatibleError(
            f"teacher {model}: no weights for {names} ({len(missing)} in all); expected a complete "
            f"{task} model, or add a fit section to train what is missing"
        )


def _check_weights(location: str, reference: TeacherReference) -> None:
    """Refuse a directory whose weights or code changed since the reference was written."""
    if not Path(location).is_dir():
        return
    digest = weights_sha256(Path(location))
    if digest != reference.weights_sha256:
        raise IncompatibleError(
            f"{location}: weights {digest[:16]}, expected {reference.weights_sha256[:16]} as the "
            "teach stage found them; run `dvc repro --force teach` to take the new ones"
        )
    if reference.trust_remote_code and not reference.trained:
        code = code_sha256(Path(location))
        if code != reference.revision:
            raise IncompatibleError(
                f"{location}: code {code[:16]}, expected {str(reference.revision)[:16]} as the "
                "teach stage found it; read it, then run `dvc repro --force teach` to trust it"
            )


def load_teacher(
    directory: Path,
    reference: TeacherReference,
    *,
    task: str,
    device: torch.device,
    dtype: torch.dtype,
    placement: Placement | None = None,
) -> PreTrainedModel:
    """Load the teacher for capture or evaluation: evaluation mode, no gradients, no KV cache.

    Args:
        directory: The teacher's directory.
        reference: The reference in that directory.
        task: The task of its head.
        device: Its device, unless it is spread over several.
        dtype: Dtype of its weights.
        placement: How it is spread over devices; see `input_device` for the device of its inputs.

    Raises:
        ConfigError: If it cannot be found, or a package that it needs is not installed.
        IncompatibleError: If its weights or its code differ from the reference.
    """
    location = reference.location(directory)
    if reference.trained and not Path(location).is_dir():
        raise ConfigError(f"{location}: the trained teacher is missing; {remedy(directory)}")
    _check_weights(location, reference)
    options = (placement or Placement()).options(device)
    quantization = Quantization.of(reference.quantization)
    if quantization is not None:
        quantization.require(f"teacher {location}")
        options["quantization_config"] = quantization.config(dtype)
    if quantization is not None or "quantization_config" in reference.config:
        # Without a device map, quantised weights go to any GPU of the machine.
        options.setdefault("device_map", {"": device})
    model = load_pretrained(
        location,
        task=task,
        revision=None if Path(location).is_dir() else reference.revision,
        trust_remote_code=reference.trust_remote_code,
        dtype=dtype,
        options=options,
    )
    remove_with(model, options)
    model.config.use_cache = False
    if not models_language(task):
        # A decoder used as classifier reads the last token that is not padding.
        model.config.pad_token_id = reference.config.get("pad_token_id")
    if "device_map" not in options:
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
        if "trust_remote_code" in str(error):
            raise _needs_code(model) from error
        raise ConfigError(
            f"teacher {model}: no configuration found ({str(error).splitlines()[0]}); expected a "
            "directory with config.json, or a hub id in the local cache"
        ) from error
    return config.to_dict()
