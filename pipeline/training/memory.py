"""Memory on a GPU and on a CPU: the most that was used, and how an allocation that failed looks."""

import resource
import sys

import torch

WORDS = ("allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")
"""How torch says by a plain RuntimeError that memory is not to be had: on a CPU, pinned for a GPU,
and for the handles of cuBLAS and cuDNN, which its own allocator does not give."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory is not to be had."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)


def peak_memory_bytes(device: torch.device) -> int:
    """Return the most memory that tensors held on a GPU, or that the process held on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
