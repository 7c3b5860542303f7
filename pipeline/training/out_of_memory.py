"""How an allocation that failed looks, on a GPU and on a CPU."""

import torch

WORDS = ("allocate memory", "not enough memory", "out of memory", "STATUS_ALLOC_FAILED")
"""How torch says by a plain RuntimeError that memory is not to be had: on a CPU, pinned for a GPU,
and for the handles of cuBLAS and cuDNN, which its own allocator does not give."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory is not to be had."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
