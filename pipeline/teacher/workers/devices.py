"""The number of worker processes and writing threads on this machine, and the GPUs they share."""

import os
from collections.abc import Sequence

import torch

from pipeline.runtime import gpu_names

MOST_WRITERS = 8
WORKERS = 2
"""Default number of workers without GPUs."""


def visible_devices(device: str) -> tuple[str, ...]:
    """Return the GPUs to distribute over workers, one each, as `CUDA_VISIBLE_DEVICES` names them.

    Empty if the device is not a GPU, or is one GPU by number.
    """
    return gpu_names() if device == "cuda" else ()


def worker_count(requested: int, device: str, devices: Sequence[str]) -> int:
    """Return how many worker processes to run.

    Args:
        requested: The parameter; 0 for one per GPU, or `WORKERS` on a CPU.
        device: The torch device of the teachers.
        devices: The GPUs to distribute.
    """
    if devices:
        # Two teachers on a GPU would need twice the memory without being faster.
        return min(requested or len(devices), len(devices))
    if device != "cpu":
        return requested or 1
    return min(requested or WORKERS, os.cpu_count() or 1)


def writer_count(requested: int, device: torch.device) -> int:
    """Return how many threads compress and write shards.

    Args:
        requested: The parameter. With 0 there is one thread if the teacher computes on the CPU;
            with a GPU there are as many as cores but one, at most `MOST_WRITERS`.
        device: The device of the teacher.
    """
    if requested or device.type == "cpu":
        return requested or 1
    return max(1, min(MOST_WRITERS, (os.cpu_count() or 1) - 1))
