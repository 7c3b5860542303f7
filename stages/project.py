"""Where a project's files are, what its parameters say, and how this machine runs them."""

import os
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline.errors import ConfigError
from pipeline.provenance import canonical_json

DATA = Path("data")
"""Everything stages write, relative to the directory that holds `params.yaml`."""

SectionType = TypeVar("SectionType")


class Section(BaseModel):
    """A frozen section of parameters: unknown keys and NaN are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Runtime(Section):
    """How this machine runs stages: `runtime.yaml` (not in git), `DECANT_*`; no result changes.

    Attributes:
        device: A torch device; `auto` takes CUDA where there is one.
        scheduler: Dask's scheduler for capture.
        workers: Segments captured at once by the `threads` scheduler.
        writers: Threads that compress and write shards.
        threads: Threads of torch; 0 leaves its choice.
    """

    device: str = "auto"
    scheduler: Literal["synchronous", "threads"] = "synchronous"
    workers: int = 2
    writers: int = 1
    threads: int = 0


def read_yaml(path: Path) -> Any:
    """Read YAML 1.2 exactly as DVC does, so that `1e-4` is the number DVC recorded.

    Raises:
        ConfigError: If the file is missing or is not YAML.
    """
    try:
        return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}; run the command in the directory that holds it"
        ) from error
    except YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: not YAML ({reason}); correct the file") from error


def section(params: Path, key: str, kind: type[SectionType] | Any) -> Any:
    """Return the section of `params.yaml` at a dotted key, validated as JSON.

    Raises:
        ConfigError: If the section is missing, or a key of it is unknown or of another type; the
            message names file and key.
    """
    value = read_yaml(params)
    done: list[str] = []
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            there = ", ".join(map(str, value)) if isinstance(value, dict) else "nothing"
            place = ".".join(done) or "the file"
            raise ConfigError(f"{params}: {place} has no {part!r}; it has {there}")
        value = value[part]
        done.append(part)
    return validate(value, kind, where=f"{params}: {key}")


def validate(value: Any, kind: Any, *, where: str) -> Any:
    """Validate plain YAML values as JSON.

    Raises:
        ConfigError: On the first key that does not fit.
    """
    try:
        return TypeAdapter(kind).validate_json(canonical_json(value))
    except ValueError as error:
        if not isinstance(error, ValidationError):
            raise ConfigError(f"{where}: {error}; use finite numbers") from error
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        found = "" if first["type"] == "missing" else f" (found {first['input']!r:.60})"
        more = len(error.errors()) - 1
        rest = f" and {more} more" if more else ""
        message = first["msg"].replace("Extra inputs are not permitted", "unknown key; remove it")
        raise ConfigError(f"{where}{'.' if key else ''}{key}: {message}{found}{rest}") from error


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
    return validate(values, Runtime, where="runtime.yaml or DECANT_*")


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
