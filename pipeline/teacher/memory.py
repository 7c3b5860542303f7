"""How an allocation that failed looks, on a GPU and on a CPU."""

import torch

WORDS = ("allocate memory", "not enough memory")
"""How torch says on a CPU that memory is not to be had, by a plain RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory is not to be had."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
