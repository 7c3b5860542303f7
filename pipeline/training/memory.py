"""The most memory that was used, on a GPU and on a CPU."""

import resource
import sys

import torch


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that tensors held on a GPU, or that the process held on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
