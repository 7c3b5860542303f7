"""The random state of this process, which can be saved and restored."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RandomState:
    """All generators that training draws from: Python's, numpy's, torch's and those of GPUs."""

    python: Any
    numpy: Any
    torch: Tensor
    cuda: tuple[Tensor, ...]

    @classmethod
    def now(cls) -> "RandomState":
        """Return the current state."""
        in_use = torch.cuda.is_available() and torch.cuda.is_initialized()
        return cls(
            random.getstate(),
            np.random.get_state(),  # noqa: NPY002 (transformers seeds and keeps this one)
            torch.get_rng_state(),
            tuple(torch.cuda.get_rng_state_all()) if in_use else (),
        )

    @classmethod
    def load(cls, path: Path) -> "RandomState":
        """Read a saved state."""
        state = torch.load(path, weights_only=True)
        kind, key, *more = state.pop("numpy")
        return cls(numpy=(kind, np.asarray(key, np.uint32), *more), **state)

    def save(self, path: Path) -> None:
        """Write this state; no object is pickled."""
        kind, key, *more = self.numpy
        torch.save({**vars(self), "numpy": (kind, key.tolist(), *more)}, path)

    def restore(self) -> None:
        """Make this the current state."""
        random.setstate(self.python)
        np.random.set_state(self.numpy)  # noqa: NPY002
        torch.set_rng_state(self.torch)
        if self.cuda:
            torch.cuda.set_rng_state_all(list(self.cuda))
