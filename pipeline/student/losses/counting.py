"""How every loss becomes a scalar: the sum over the units that count, divided by their number.

The divisor may come from the caller, because a term divides by its own count over all accumulation
steps and ranks. A mean of means would give a short batch the weight of a long one.
"""

from jaxtyping import Float

from pipeline.student.losses.lazy_torch import Tensor, torch

Count = int | float | Tensor | None


def sum_over_count(per_unit: Float[Tensor, " units"], count: Count) -> Float[Tensor, ""]:
    """Divide the sum of `per_unit` by the number of units that count.

    Args:
        per_unit: One value for each unit that counts; padding is already gone.
        count: Units to divide by, over all accumulation steps and ranks. None: those of this call.

    Returns:
        The scalar, with a graph. With nothing to count it is exactly 0 and so is its gradient.
    """
    total = per_unit.sum()
    if count is None:
        count = per_unit.numel()
    if isinstance(count, Tensor):
        # A comparison on the device: reading the count on the host would wait for the GPU.
        return total / torch.where(count > 0, count, torch.ones_like(count)).to(total.dtype)
    return total / (count if count > 0 else 1.0)
