"""Build a model's inputs: no attention mask for causal models, and no key-value cache.

In a causal model no live token can see the padding on its right, so the mask can be left out.
Attention can then use the fused causal kernels, which do not accept explicit masks.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.taps.configuration import text_part

COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
"""The columns of a batch that a model may take."""


def model_columns(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the columns of a batch that the model's `forward` has a parameter for.

    A tokenizer may produce more columns than a model takes: DistilBERT and Llama have no token
    types, RoBERTa has only one, and a student can have a different family than its teacher.
    """
    taken = set(inspect.signature(model.forward).parameters) & set(batch)
    if getattr(text_part(model.config), "type_vocab_size", None) in (0, 1):
        taken -= {"token_type_ids"}
    return {name: batch[name] for name in COLUMNS if name in taken}


def model_inputs(batch: Mapping[str, Tensor], *, is_causal: bool) -> dict[str, Any]:
    """Return the keyword arguments for a right-padded batch with its `attention_mask`.

    Results at live positions are the same as with the mask; at padding they are undefined. Take
    `is_causal` from a tap report, where it was measured: for a model that is not causal, padding
    would otherwise change the results.
    """
    if not is_causal:
        return dict(batch)
    inputs: dict[str, Any] = {
        name: value for name, value in batch.items() if name != "attention_mask"
    }
    return inputs | {"use_cache": False}


def run_base(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Float[Tensor, "batch seq d"]:
    """Run the model without its head; taps on `model` still record.

    Returns the base model's output, which is the head's input.
    """
    return model.base_model(**inputs)[0]
