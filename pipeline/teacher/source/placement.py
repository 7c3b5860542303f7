"""Placement of a teacher's weights: on one device, or spread over several, the CPU and disk.

Placement does not change values, so it is not part of a store's identity. Weights are loaded
directly to their device in their dtype; accelerate's hooks move offloaded weights and inputs.
"""

import shutil
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from transformers import PreTrainedModel

from pipeline.errors import ConfigError
from pipeline.runtime import Runtime

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
OFFLOADED = ("cpu", "disk")
"""Entries of a device map whose weights are moved to a device when they are needed."""


@dataclass(frozen=True)
class Placement:
    """How a teacher is spread, in accelerate's terms; without `device_map` it is on one device.

    `device_map` is one of `AUTOMATIC`, or maps modules to a device, `cpu` or `disk`. `max_memory`
    is the memory to use per device, by its number or `cpu`. Weights on disk that cannot be read
    from the teacher's own files are written below `offload_directory`, and removed with the model.
    """

    device_map: str | Mapping[str, int | str] | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    offload_directory: Path | None = None

    @classmethod
    def of(cls, runtime: Runtime) -> "Placement | None":
        """Return how a teacher is spread over this machine; None if one device holds it.

        Raises:
            ConfigError: If `max_memory` or `offload_directory` is given without `device_map`.
        """
        if runtime.device_map is None:
            for key in ("max_memory", "offload_directory"):
                if getattr(runtime, key) is not None:
                    raise ConfigError(
                        f"runtime {key}: given without device_map, expected both; add device_map: "
                        f"auto, or remove {key}"
                    )
            return None
        memory: dict[int | str, int | str] | None = None
        if runtime.max_memory is not None:
            memory = {int(k) if k.isdigit() else k: size for k, size in runtime.max_memory.items()}
        return cls(runtime.device_map, memory, runtime.offload_directory)

    def options(self, device: torch.device) -> dict[str, Any]:
        """Return the arguments of `from_pretrained`.

        Args:
            device: The device of a teacher that is not spread.
        """
        if self.device_map is None:
            return {} if device.type == "cpu" else {"device_map": {"": device}}
        device_map = self.device_map
        options: dict[str, Any] = {
            "device_map": device_map if isinstance(device_map, str) else dict(device_map)
        }
        if self.max_memory is not None:
            options["max_memory"] = dict(self.max_memory)
        if self.offload_directory is not None:
            self.offload_directory.mkdir(parents=True, exist_ok=True)
            # A separate directory per load: workers load at the same time.
            options["offload_folder"] = mkdtemp(dir=self.offload_directory)
        return options


def remove_with(model: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Delete a model's offloaded weights when the model is freed, at the latest at exit."""
    if folder := options.get("offload_folder"):
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)


def is_spread(model: PreTrainedModel) -> bool:
    """Tell whether a model was loaded with a device map and must not be moved."""
    return hasattr(model, "hf_device_map")


def input_device(model: PreTrainedModel, device: torch.device) -> torch.device:
    """Return the device of a model's inputs; `device` is that of a model that is not spread.

    As in accelerate, offloaded modules run on the first device of the map that is not `OFFLOADED`.
    """
    if not is_spread(model):
        return device
    device_map: dict[str, Any] = model.hf_device_map  # pyright: ignore[reportAssignmentType]
    main = next((entry for entry in device_map.values() if entry not in OFFLOADED), "cpu")
    embeddings = model.get_input_embeddings()
    name = next(name for name, part in model.named_modules() if part is embeddings)
    parents = [key for key in device_map if not key or name == key or name.startswith(f"{key}.")]
    entry = device_map[max(parents, key=len)]
    entry = main if entry in OFFLOADED else entry
    return torch.device("cuda", entry) if isinstance(entry, int) else torch.device(entry)
