"""How many worker processes this machine runs, and which GPU each of them sees."""

import os
from collections.abc import Sequence

import torch

WORKERS = 2
"""Where neither GPUs nor the user say how many."""


def visible_devices(device: str) -> tuple[str, ...]:
    """Return the GPUs that workers share out, a GPU each, as `CUDA_VISIBLE_DEVICES` names them.

    None where the device is no GPU, or is one by its number: then nothing is shared out.
    """
    if device != "cuda":
        return ()
    # What this process was given may be numbers or UUIDs, and more than there is.
    listed = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    count = torch.cuda.device_count()
    return tuple(([name for name in listed if name] or [str(n) for n in range(count)])[:count])


def worker_count(asked: int, device: str, devices: Sequence[str]) -> int:
    """Return how many worker processes to run.

    Args:
        asked: What the user says; 0 for as many as there are GPUs, or `WORKERS` on a CPU.
        device: The torch device of every teacher.
        devices: The GPUs to share out.
    """
    if devices:
        # Two teachers on a GPU take turns there, and the memory of two.
        return min(asked or len(devices), len(devices))
    if device != "cpu":
        return asked or 1
    return min(asked or WORKERS, os.cpu_count() or 1)
