"""Where a project's files are, and how this machine runs its stages."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pipeline.errors import ConfigError
from stages.parameters import Section, read_yaml, validate

DATA = Path("data")
"""Everything stages write, relative to the directory that holds `params.yaml`."""


class Runtime(Section):
    """How this machine runs stages: `runtime.yaml` (not in git), `DECANT_*`; no result changes.

    Attributes:
        device: A torch device; `auto` takes CUDA where there is one.
        scheduler: Dask's scheduler for capture; `processes` are workers that may die.
        workers: Segments captured at once by `threads` or `processes`.
        worker_megabytes: Memory at which a worker process is ended; 0 sets no limit.
        writers: Threads that compress and write shards.
        threads: Threads of torch; 0 leaves its choice.
    """

    device: str = "auto"
    scheduler: Literal["synchronous", "threads", "processes"] = "synchronous"
    workers: Annotated[int, Field(ge=1)] = 2
    worker_megabytes: Annotated[int, Field(ge=0)] = 0
    writers: Annotated[int, Field(ge=1)] = 1
    threads: Annotated[int, Field(ge=0)] = 0


def runtime() -> Runtime:
    """Read `runtime.yaml`, then `DECANT_DEVICE`, `DECANT_SCHEDULER` and so on, which win.

    Raises:
        ConfigError: If a value is not one of the allowed.
    """
    path = Path("runtime.yaml")
    values = (read_yaml(path) or {}) if path.exists() else {}
    for key in Runtime.model_fields:
        text = os.environ.get(f"DECANT_{key.upper()}")
        if text is not None:
            values[key] = int(text) if text.isdigit() else text
    return validate(values, Runtime, file="runtime.yaml or DECANT_*")


def prepare_torch(settings: Runtime) -> str:
    """Apply the number of threads; return the device to use.

    Raises:
        ConfigError: If the device is not there.
    """
    import torch
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    if settings.threads:
        torch.set_num_threads(settings.threads)
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=settings.device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"runtime device {settings.device!r}: {reason}; use cpu or auto"
        ) from error
    return settings.device


def shared_root() -> Path:
    """Return the project that owns stores and checkpoints; queued experiments share them."""
    return Path(os.environ.get("DVC_ROOT", Path.cwd()))


def stores() -> Path:
    """Directory of stores; not a DVC output."""
    return shared_root() / DATA / "stores"


def work() -> Path:
    """Directory of checkpoints and scratch; not a DVC output."""
    return shared_root() / DATA / "work"
