"""The directories of a project, and the settings of this machine."""

import os
import re
from pathlib import Path

from pipeline.errors import ConfigError, IntegrityError
from pipeline.provenance import read_json
from pipeline.runtime import Runtime, gpu_names
from stages.parameters import read_yaml, validate

DATA = Path("data")
"""Where stages write, relative to the directory of `params.yaml`."""
SWITCHES = {"true": True, "false": False}
"""Truth values in environment variables."""


def runtime() -> Runtime:
    """Read `runtime.yaml`, then `DECANT_DEVICE`, `DECANT_SCHEDULER` and so on, which win.

    Raises:
        ConfigError: If a value is not allowed.
    """
    path = Path("runtime.yaml")
    values = (read_yaml(path) or {}) if path.exists() else {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path}: found {type(values).__name__}, expected keys and values, as `threads: 2`; "
            "correct it"
        )
    for key in Runtime.model_fields:
        # A variable set to nothing counts as not set.
        if text := os.environ.get(f"DECANT_{key.upper()}"):
            values[key] = _variable(text)
    settings: Runtime = validate(values, Runtime, file="runtime.yaml or DECANT_*")
    if settings.device_map is None or settings.offload_directory is not None:
        return settings
    return settings.model_copy(update={"offload_directory": work() / "offload"})


def _variable(text: str) -> int | float | bool | str:
    """Return a variable's value as YAML would read it: a number, a truth value or text."""
    for pattern, kind in ((r"-?[0-9]{1,18}", int), (r"-?[0-9]+\.[0-9]+", float)):
        if re.fullmatch(pattern, text):
            return kind(text)
    return SWITCHES.get(text, text)


def on_one_gpu(settings: Runtime) -> Runtime:
    """Hide all GPUs but the one that `device` names: transformers trains on the first that it sees.

    To be called before CUDA is initialised.

    Raises:
        ConfigError: If there is no such GPU.
    """
    if not settings.device.startswith("cuda:"):
        return settings
    names, number = gpu_names(), settings.device.removeprefix("cuda:")
    if not number.isdecimal() or int(number) >= len(names):
        raise ConfigError(
            f"runtime device {settings.device!r}: found {len(names)} GPUs, expected the number of "
            "one, from 0; correct it, or use cpu or auto"
        )
    os.environ["CUDA_VISIBLE_DEVICES"] = names[int(number)]
    return settings.model_copy(update={"device": "cuda"})


def prepare_torch(settings: Runtime) -> str:
    """Apply the number of threads; return the device to use.

    Raises:
        ConfigError: If there is no such device.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    return settings.torch_device()


def teacher_of(text: str) -> str:
    """Return the name of the teacher whose store a text names; `TEACHER` if that is unknown."""
    for file in sorted((DATA / "manifests").glob("*/store.json")):
        try:
            if str(read_json(file)["store"]) in text:
                return file.parent.name
        except (IntegrityError, KeyError, TypeError):
            continue
    return "TEACHER"


def shared_root() -> Path:
    """Return the project directory whose stores and checkpoints queued experiments share."""
    return Path(os.environ.get("DVC_ROOT", Path.cwd()))


def stores() -> Path:
    """Directory of stores; not a DVC output."""
    return shared_root() / DATA / "stores"


def work() -> Path:
    """Directory of checkpoints and scratch; not a DVC output."""
    return shared_root() / DATA / "work"
