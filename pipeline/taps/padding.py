"""Proof that padding changes nothing, for models that are not causal."""

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.taps.comparison import Comparison
from pipeline.taps.inputs import run_base


def check_padding(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], comparison: Comparison
) -> None:
    """Run the batch with other ids at its padding and see that all live positions stay.

    A model that ignores the mask (FNet) gives a row other states in every batch, which neither a
    store nor a loss can stand.

    Raises:
        IncompatibleError: With the difference and the bound.
    """
    ids, live = inputs["input_ids"], comparison.live
    if live.all():
        return
    # An id of the row itself is no special one.
    other = dict(inputs) | {"input_ids": torch.where(live, ids, ids[:, :1])}
    difference = comparison.difference(run_base(model, other), run_base(model, inputs))
    if not difference <= comparison.bound:
        raise IncompatibleError(
            f"{comparison.model_class}: states of a row differ by {difference:.2g} with the "
            f"padding behind it, expected at most {comparison.bound:g}; it does not heed the "
            "attention mask, choose another model"
        )
