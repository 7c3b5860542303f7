"""`torch` and `Tensor`, imported at their first use and not before.

Losses are declared where they are defined, and `params.yaml` is checked against the declarations.
That check takes a fraction of the second that importing torch takes.
"""

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:

    class _TensorType(type):
        def __instancecheck__(cls, value: Any) -> bool:
            torch = sys.modules.get("torch")
            return torch is not None and isinstance(value, torch.Tensor)

    class Tensor(metaclass=_TensorType):
        """Stands for `torch.Tensor` in signatures and `isinstance`."""

    class _Torch:
        def __getattr__(self, name: str) -> Any:
            return getattr(importlib.import_module("torch"), name)

    torch = _Torch()

__all__ = ["Tensor", "torch"]
