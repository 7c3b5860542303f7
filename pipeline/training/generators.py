"""Keeps the random state of this process from what draws in between."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def forked_generators() -> Iterator[None]:
    """Restore the random state of the CPU, and of GPUs in use, after the block.

    Without devices, `fork_rng` warns on a machine with several GPUs and initialises CUDA.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=devices):
        yield
