"""Loads a teacher for inference, or refuses it before anything expensive."""

import logging
import threading
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel

from pipeline.errors import ConfigError, IncompatibleError, ResourceError, in_short
from pipeline.taps.configuration import auto_class
from pipeline.tasks import models_language, outputs_of
from pipeline.teacher.source.placement import Placement, remove_with
from pipeline.teacher.source.quantization import Quantization
from pipeline.teacher.source.reference import TeacherReference
from pipeline.teacher.source.weights import weights_sha256
from pipeline.training.memory import is_out_of_memory
from pipeline.training.own_code import code_sha256, own_code
from pipeline.written_by import remedy

logger = logging.getLogger(__name__)
_LOADING = threading.Lock()
"""transformers swaps methods of its classes while it loads; two threads at once leave them so."""
SIZES = "ignore_mismatched_sizes"
"""What the library names when weights are of other sizes."""
PROBLEM_TYPES = {
    "classification": "single_label_classification",
    "multi-label": "multi_label_classification",
    "regression": "regression",
}
"""Which loss a sequence model of the library computes."""


def head_options(task: str, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return the configuration keys of a new head: its size, its names and its loss."""
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
        model: A directory, or a hub id.
        task: What the head is for.
        revision: Revision of a hub id.
        trust_remote_code: Run code from the model's repository.
        dtype: Of the weights.
        classes: Names of the classes, for a head of as many.
        new_head: Draw the head anew where the stored one is of another size.
        seed: Of what the weights on disk do not bring.
        options: What else `from_pretrained` takes, as the places of weights.

    Raises:
        ConfigError: If it cannot be found, needs remote code that was not asked for or a package
            that is not there, or has no place as `options` say.
        IncompatibleError: If the architecture has no such head.
        ResourceError: If the weights do not fit into memory.
    """
    if not trust_remote_code and own_code(model, revision):
        raise _needs_code(model)  # also where it was put there after the teach stage
    keywords: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if classes and not new_head:
        names = dict(enumerate(classes))
        keywords |= {"num_labels": len(classes), "id2label": names}
        keywords["label2id"] = {name: i for i, name in names.items()}
    try:
        with _LOADING, torch.random.fork_rng():
            torch.manual_seed(seed)
            if new_head and not models_language(task):
                # A checkpoint of another task would bring that task's loss along, and the library
                # refuses its own number of classes with ours: both are replaced, after loading.
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
        _refuse_places(error, options)
        raise IncompatibleError(f"teacher {model}: no {task} model ({reason})") from error
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise ResourceError(
                f"teacher {model}: its weights do not fit into memory ({in_short(error)}); give "
                "device_map: auto in runtime.yaml, a narrower capture.dtype or quantization"
            ) from error
        if SIZES not in str(error):
            _refuse_places(error, options)
        raise IncompatibleError(
            f"teacher {model}: weights of other sizes than its configuration says "
            f"({in_short(error)}); expected a directory that save_pretrained "
            "wrote"
        ) from error
    if not new_head:
        _refuse_missing(model, task, info["missing_keys"])
    return loaded


def _refuse_places(error: Exception, options: Mapping[str, Any] | None) -> None:
    """Say that a map of devices, if there is one, does not fit the model or the machine."""
    places = (options or {}).get("device_map")
    # Of one device the machine has been asked before.
    if isinstance(places, str) or (places and "" not in places):
        raise ConfigError(
            f"runtime device_map {places}: {in_short(error)}; expected a device of this machine, "
            "cpu or disk for every module, or auto"
        ) from error


def _needs_code(model: str) -> ConfigError:
    return ConfigError(
        f"teacher {model}: needs code from its repository; set model.trust_remote_code: true and "
        "pin model.revision (a directory needs none) if you trust it"
    )


def _refuse_missing(model: str, task: str, missing: Collection[str]) -> None:
    """Weights that are not on disk would be drawn at random, without a word."""
    if missing:
        names = ", ".join(sorted(missing)[:3])
        raise IncompatibleError(
            f"teacher {model}: no weights for {names} ({len(missing)} in all); expected a whole "
            f"{task} model, or add a fit section to train what is missing"
        )


def _check_weights(location: str, reference: TeacherReference) -> None:
    """A directory's weights and code may have been replaced since the reference was written."""
    if not Path(location).is_dir():
        return
    found = weights_sha256(Path(location))
    if found != reference.weights_sha256:
        raise IncompatibleError(
            f"{location}: weights {found[:16]}, expected {reference.weights_sha256[:16]} as the "
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
        reference: What is in it.
        task: What its head is for.
        device: Where it runs, unless it is spread.
        dtype: Of its weights.
        placement: How it is spread over devices; see `input_device` for where its inputs go.

    Raises:
        ConfigError: If it cannot be found, or what it needs is not there.
        IncompatibleError: If its weights or its code are not those of the reference.
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
        # Without a place such weights go to whatever GPU there is.
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
        # A decoder that classifies looks for the last token that is not padding.
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
            f"teacher {model}: no configuration to be had ({str(error).splitlines()[0]}); "
            f"expected a "
            "directory with config.json, or a hub id in the local cache"
        ) from error
    return config.to_dict()
