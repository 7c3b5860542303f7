"""Read a module's weights as plain tensors, even if they are offloaded or quantised.

Weights of a teacher that is larger than its device may be on the CPU or on disk, and its modules
then hold empty tensors (accelerate). Weights quantised to 8 or 4 bits are stored as codes
(bitsandbytes).
"""

from collections.abc import Callable

import torch
from accelerate.utils import align_module_device, has_offloaded_params
from torch import Tensor, nn

from pipeline.errors import IncompatibleError

QUANTIZED = ("Int8Params", "Params4bit")
"""Class names of quantised bitsandbytes parameters; the package is not a dependency."""


def plain_weights(
    module: nn.Module, selects: Callable[[str], bool] = lambda name: True
) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by name, with `state_dict`'s names and order.

    Tensors on a device are not copied; offloaded ones are read into CPU memory.

    Args:
        module: A model or a submodule.
        selects: Selects tensors by name; only these are read.

    Raises:
        IncompatibleError: If a parameter is quantised in an unsupported way.
    """
    weights: dict[str, Tensor] = {}
    for path, part in module.named_modules(remove_duplicate=False):
        prefix = f"{path}." if path else ""
        own = (*part._parameters, *part._buffers)
        transient = part._non_persistent_buffers_set
        names = {n: prefix + n for n in own if n not in transient and selects(prefix + n)}
        if not names:
            continue
        device = torch.device("cpu") if has_offloaded_params(part) else None
        with align_module_device(part, device):
            for name, full in names.items():
                value = getattr(part, name)
                if value is not None:
                    weights[full] = _dequantized(part, full, value)
    return weights


def _dequantized(module: nn.Module, name: str, value: Tensor) -> Tensor:
    if type(value).__name__ in QUANTIZED:
        from transformers.integrations.bitsandbytes import dequantize_bnb_weight

        if getattr(getattr(value, "quant_state", None), "packing_format_for_cpu", False):
            return _from_products(module)
        return dequantize_bnb_weight(value, getattr(module, "state", None))  # pyright: ignore[reportArgumentType]
    if isinstance(value, nn.Parameter) and not value.is_floating_point():
        raise IncompatibleError(
            f"{name}: stored as {value.dtype}, expected floating-point numbers; leave blocks, the "
            "head and attention in form below out for this teacher, or use its unquantised weights"
        )
    return value


@torch.no_grad()
def _from_products(module: nn.Module) -> Tensor:
    """Return a linear module's matrix by multiplying it with the identity.

    On some CPUs bitsandbytes reorders 4-bit weights at the first product, and its version 0.50
    dequantises that order wrongly for matrix rows of more than one block of 64.
    """
    assert isinstance(module, nn.Linear)
    product = module(torch.eye(module.in_features))
    return (product if module.bias is None else product - module.bias).T
