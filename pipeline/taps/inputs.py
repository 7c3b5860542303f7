"""What a model is given: no mask where a causal model needs none, and no key-value cache.

Behind a causal mask no live row can see the padding on its right, so the mask may be left out;
attention then takes the fused causal kernels, which refuse explicit masks.
"""

import inspect
from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from pipeline.taps.configuration import text_part

COLUMNS = ("input_ids", "attention_mask", "token_type_ids")
"""Everything of a batch that a model may be given."""


def model_columns(model: PreTrainedModel, batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return those columns of a batch that the model's `forward` names.

    A tokenizer may make more than a model takes: DistilBERT and Llama know no segments, RoBERTa
    has one, and a student of another family than its teacher shares the teacher's rows.
    """
    taken = set(inspect.signature(model.forward).parameters) & set(batch)
    if getattr(text_part(model.config), "type_vocab_size", None) in (0, 1):
        taken -= {"token_type_ids"}
    return {name: batch[name] for name in COLUMNS if name in taken}


def model_inputs(batch: Mapping[str, Tensor], *, is_causal: bool) -> dict[str, Any]:
    """Return the keyword arguments for a right-padded batch with its `attention_mask`.

    Live positions come out as with the mask; what stands at padding is undefined. `is_causal` must
    be the measured one of a tap report, or a model whose padding shows would be read wrongly.
    """
    if not is_causal:
        return dict(batch)
    inputs: dict[str, Any] = {
        name: value for name, value in batch.items() if name != "attention_mask"
    }
    return inputs | {"use_cache": False}


def run_base(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Float[Tensor, "batch seq d"]:
    """Run all below the head: no logits are computed, and taps on `model` record as ever.

    Returns the base model's output, which is what the head reads.
    """
    return model.base_model(**inputs)[0]
