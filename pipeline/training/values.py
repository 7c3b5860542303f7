"""Loss, terms and gradient norm of each step, kept on the device until they are logged.

Reading a number waits for the device, so nothing is read between two points of the curve. A
checkpoint holds the values that are not logged yet: a resumed run logs the same means as an
uninterrupted one.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.amp import GradScaler

from pipeline.errors import IntegrityError

LOSS = "loss"
GRADIENT = "gradient"
"""The norm of the whole gradient, before it is clipped."""
SMALLEST_SCALE = 2.0**-8
"""Of float16's gradients: it starts at 65,536 and is halved at each gradient that is not finite, so
one that would overflow even here has no end."""
Found = Mapping[int, Mapping[str, float]]


class StepValues:
    """The loss, its terms and the gradient's norm, step by step."""

    def __init__(self) -> None:
        self._rows: dict[int, dict[str, Tensor]] = {}

    def add(self, step: int, values: Mapping[str, Tensor]) -> None:
        """Add values of one micro-batch of a step to those of its others."""
        row = self._rows.setdefault(step, {})
        for name, value in values.items():
            value = value.detach().float()
            row[name] = row[name] + value if name in row else value

    def read(self, over_ranks: Callable[[Tensor], Tensor]) -> dict[int, dict[str, float]]:
        """Return the values of each step. This waits for the device, once.

        Args:
            over_ranks: Sums a tensor over all ranks.
        """
        flat = [value for row in self._rows.values() for value in row.values()]
        if not flat:
            return {}
        numbers = iter(over_ranks(torch.stack(flat)).tolist())
        return {step: {name: next(numbers) for name in row} for step, row in self._rows.items()}

    def clear(self) -> None:
        """Forget what was read."""
        self._rows = {}

    def save(self, path: Path) -> None:
        """Write what is not read yet; without any, no file."""
        flat = {
            f"{step}.{name}": value
            for step, row in self._rows.items()
            for name, value in row.items()
        }
        if flat:
            save_file(flat, str(path))

    def load(self, path: Path, device: torch.device) -> None:
        """Take up what a checkpoint holds."""
        self.clear()
        flat = load_file(str(path)) if path.exists() else {}
        # By number: steps in the order in which they were taken.
        for key in sorted(flat, key=lambda key: int(key.split(".")[0])):
            step, _, name = key.partition(".")
            self.add(int(step), {name: flat[key].to(device)})


def means(found: Found) -> dict[str, float]:
    """Return each value's mean over the steps that have it."""
    names = dict.fromkeys(name for row in found.values() for name in row)
    columns = {name: [row[name] for row in found.values() if name in row] for name in names}
    return {name: math.fsum(column) / len(column) for name, column in columns.items()}


def check_scale(scaler: GradScaler | None, what: str, step: int) -> None:
    """Refuse to go on where float16's gradients are not finite at any scale.

    Raises:
        IntegrityError: If the scale is below the smallest.
    """
    if scaler is not None and scaler.get_scale() < SMALLEST_SCALE:
        raise IntegrityError(
            f"{what}: the gradient is not finite in float16 at any scale, at step {step}; set "
            "precision to bfloat16 or float32, or lower learning_rate, then run the same command "
            "again"
        )


def check_finite(found: Found, what: str) -> None:
    """Refuse values that are not finite, naming the step at which the first came and what it was.

    One bad update makes everything after it bad, so only the first step says where it began.

    Args:
        found: The values of each step.
        what: What is trained, for the message.

    Raises:
        IntegrityError: If a term, the loss or the gradient's norm is not finite.
    """
    for step in sorted(found):
        bad = {name: v for name, v in found[step].items() if not math.isfinite(v)}
        if not bad:
            continue
        terms = [name for name in bad if name not in (LOSS, GRADIENT)]
        if terms:
            said = " and ".join(f"the {name} term is {bad[name]}" for name in terms)
            cure = f"lower learning_rate or the weight of {' and '.join(terms)}"
        elif LOSS in bad:
            said, cure = f"the loss is {bad[LOSS]}", "lower learning_rate"
        else:
            said = f"the loss is finite and its gradient's norm is {bad[GRADIENT]}"
            cure = "lower learning_rate"
        raise IntegrityError(
            f"{what}: {said} at step {step}; {cure}, then run the same command again"
        )
