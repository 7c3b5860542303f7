"""A module's weights as the numbers it computes with, wherever they lie, however they are packed.

Of a teacher that is larger than its device, some weights wait on the CPU or on disk and the module
holds none (accelerate); packed in eight or four bits, it holds codes of them (bitsandbytes).
"""

from collections.abc import Callable

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

from pipeline.errors import IncompatibleError

PACKED = ("Int8Params", "Params4bit")
"""How bitsandbytes calls its parameters; the package is no dependency."""


def plain_weights(
    module: nn.Module, wanted: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, as `state_dict` names and orders them.

    What is on a device already is not copied; what was offloaded is read into CPU memory.

    Args:
        module: A model or a part of it.
        wanted: Tells by its name whether a tensor is wanted; no other is read.

    Raises:
        IncompatibleError: If a parameter is packed in a way that is not known here.
    """
    found: dict[str, Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        own = (*part._parameters, *part._buffers)
        passing = part._non_persistent_buffers_set
        names = {n: prefix + n for n in own if n not in passing and wanted(prefix + n)}
        if not names:
            continue
        elsewhere = torch.device("cpu") if has_offloaded_params(part) else None
        with align_module_device(part, elsewhere):
            for name, full in names.items():
                value = getattr(part, name)
                if value is not None:
                    found[full] = _unpacked(part, full, value)
    return found


def _unpacked(module: nn.Module, name: str, value: Tensor) -> Tensor:
    if type(value).__name__ in PACKED:
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        if getattr(getattr(value, "quant_state", None), "packing_format_for_cpu", False):
            return _asked(module)
        return dequantize_bnb_weight(value, getattr(module, "state", None))  # pyright: ignore[reportArgumentType]
    if isinstance(value, nn.Parameter) and not value.is_floating_point():
        raise IncompatibleError(
            f"{name}: packed as {value.dtype}, expected floating-point numbers; leave blocks, the "
            "head and attention in form below out for this teacher, or use its unquantised weights"
        )
    return value


@torch.no_grad()
def _asked(module: nn.Module) -> Tensor:
    """Return a linear module's matrix by its products with the unit vectors.

    Some CPUs want four bits in an order of their own from the first product on, which bitsandbytes
    0.50 takes back wrongly for rows of more than one block of 64.
    """
    assert isinstance(module, nn.Linear)
    found = module(torch.eye(module.in_features))
    return (found if module.bias is None else found - module.bias).T
