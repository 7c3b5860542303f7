"""Spreads a teacher over devices, CPU and disk as `runtime.yaml` says."""

from typing import TYPE_CHECKING

from pipeline.errors import ConfigError
from stages.project import Runtime, work

if TYPE_CHECKING:
    from pipeline.teacher.source.placement import Placement


def placement(settings: Runtime) -> "Placement | None":
    """Return how a teacher is spread over this machine's devices; None if one device holds it.

    Raises:
        ConfigError: If `max_memory` or `offload_directory` is given without `device_map`.
    """
    if settings.device_map is None:
        for key in ("max_memory", "offload_directory"):
            if getattr(settings, key) is not None:
                raise ConfigError(
                    f"runtime {key}: given without device_map, expected both; add device_map: "
                    f"auto, or remove {key}"
                )
        return None
    from pipeline.teacher.source.placement import Placement

    memory: dict[int | str, int | str] | None = None
    if settings.max_memory is not None:
        memory = {int(k) if k.isdigit() else k: size for k, size in settings.max_memory.items()}
    directory = settings.offload_directory or work() / "offload"
    return Placement(settings.device_map, memory, directory)
