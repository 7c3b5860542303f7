"""The optimiser of a student and the schedule of its learning rate."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_pt_utils import get_parameter_names

from pipeline.training.arguments import OPTIMIZERS, warmup_steps

NOT_DECAYED = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
"""Names of weights that have no weight decay, as `transformers.Trainer` has them."""


def make_optimizer(model: nn.Module, arguments: TrainingArguments) -> torch.optim.Optimizer:
    """Return the optimiser of a model's trainable weights; biases and norms do not decay."""
    decayed = set(get_parameter_names(model, [nn.LayerNorm], NOT_DECAYED))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for name, p in trained if (name in decayed) is decays], "weight_decay": decay}
        for decays, decay in ((True, arguments.weight_decay), (False, 0.0))
    ]
    factory, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    optimizer = factory(groups, **options)
    if arguments.optim == OPTIMIZERS["adamw_8bit"]:
        from bitsandbytes.optim.optimizer import GlobalOptimManager

        manager = GlobalOptimManager.get_instance()
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def make_schedule(
    optimizer: torch.optim.Optimizer, arguments: TrainingArguments, phases: Sequence[int]
) -> LambdaLR:
    """Return the learning rate's schedule; each phase has all of it, warm-up included.

    The optimiser's moments go on: they are the student's, whose weights go on too.

    Args:
        optimizer: Whose learning rate.
        arguments: The schedule's kind and its warm-up.
        phases: The number of steps of each phase.
    """
    shapes = [_shape(arguments, steps) for steps in phases]
    begins = list(accumulate(phases, initial=0))

    def factor(step: int) -> float:
        # The schedule is asked for a step after the last one, too.
        phase = min(bisect_right(begins, step), len(phases)) - 1
        return float(shapes[phase](step - begins[phase]))

    return LambdaLR(optimizer, factor)


def _shape(arguments: TrainingArguments, steps: int) -> Callable[[int], float]:
    """Return the factor of the learning rate by step of one schedule."""
    unused = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    schedule: Any = get_scheduler(
        arguments.lr_scheduler_type,
        optimizer=unused,
        num_warmup_steps=warmup_steps(arguments, steps),
        num_training_steps=steps,
    )
    return schedule.lr_lambdas[0]
