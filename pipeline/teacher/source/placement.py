"""Where a teacher's weights lie: on one device, or spread over several, the CPU and disk.

It changes where a value is computed and not which, so it is no part of a store's identity. Weights
are read straight to their place, in their dtype; accelerate's hooks carry them and their inputs.
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

AUTOMATIC = ("auto", "balanced", "balanced_low_0", "sequential")
ELSEWHERE = ("cpu", "disk")
"""Places whose weights are brought to a device when they are needed."""


@dataclass(frozen=True)
class Placement:
    """How a teacher is spread, in accelerate's words; without `device_map` it is on one device.

    `device_map` is one of `AUTOMATIC` or says of each module a device, `cpu` or `disk`.
    `max_memory` is what may be used of a device, by its number or `cpu`. What disk takes and is not
    in the teacher's own files as it is needed is written below `offload_directory`, and removed
    with the model.
    """

    device_map: str | Mapping[str, int | str] | None = None
    max_memory: Mapping[int | str, int | str] | None = None
    offload_directory: Path | None = None

    def options(self, device: torch.device) -> dict[str, Any]:
        """Return what `from_pretrained` takes for it.

        Args:
            device: Where a teacher lies that is not spread.
        """
        if self.device_map is None:
            return {} if device.type == "cpu" else {"device_map": {"": device}}
        places = self.device_map
        found: dict[str, Any] = {"device_map": places if isinstance(places, str) else dict(places)}
        if self.max_memory is not None:
            found["max_memory"] = dict(self.max_memory)
        if self.offload_directory is not None:
            self.offload_directory.mkdir(parents=True, exist_ok=True)
            # One of its own: workers load at the same time.
            found["offload_folder"] = mkdtemp(dir=self.offload_directory)
        return found


def remove_with(model: PreTrainedModel, options: Mapping[str, Any]) -> None:
    """Remove a model's offloaded weights when the model is gone, at the latest when Python ends."""
    if folder := options.get("offload_folder"):
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)


def is_spread(model: PreTrainedModel) -> bool:
    """Tell whether a model's parts were given their places when it was loaded, and must stay."""
    return hasattr(model, "hf_device_map")


def input_device(model: PreTrainedModel, device: torch.device) -> torch.device:
    """Return where a model takes its inputs, given the device of one that is not spread.

    What is offloaded runs on the map's first device that is none of `ELSEWHERE`, as accelerate
    does it.
    """
    if not is_spread(model):
        return device
    found: dict[str, Any] = model.hf_device_map  # pyright: ignore[reportAssignmentType]
    main = next((place for place in found.values() if place not in ELSEWHERE), "cpu")
    embeddings = model.get_input_embeddings()
    name = next(name for name, part in model.named_modules() if part is embeddings)
    above = [key for key in found if not key or name == key or name.startswith(f"{key}.")]
    place = found[max(above, key=len)]
    place = main if place in ELSEWHERE else place
    return torch.device("cuda", place) if isinstance(place, int) else torch.device(place)
