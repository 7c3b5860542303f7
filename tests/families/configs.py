"""Every text family that the installed transformers has, as small as it can be made."""

import dataclasses
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from pipeline.taps.configuration import text_part
from pipeline.taps.miniature import miniature
from tests.captured import VOCAB
from tests.tiny import PAD_ID

TASKS = {
    "causal-lm": MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classification": MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
DEPTHS = (2, 3, 4, 6)
IDS = {"pad_token_id": PAD_ID, "bos_token_id": 1, "eos_token_id": 2}
WANTED: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": None},
    "deepseek_v2": {"num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "ministral": {"head_dim": 16},
    "nemotron": {"head_dim": 16},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
}
"""What a family's defaults leave open or make too large."""


def families(task: str) -> list[str]:
    """Return the families with a model of a task, by model type."""
    return sorted(TASKS[task])


def small_config(model_type: str) -> PreTrainedConfig:
    """Return a small configuration with each kind of layer that the family's default has.

    Raises:
        Exception: Whatever the family's code raises at sizes that it does not take.
    """
    family = type(text_part(CONFIG_MAPPING[model_type]()))
    fields = {field.name for field in dataclasses.fields(family)}
    own = family.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    kinds = _kinds(family)
    wanted = WANTED.get(model_type, {})
    last: Exception | None = None
    for depth in (len(kinds["layer_types"]),) if kinds else DEPTHS:
        try:
            config = family(**({own: depth} if own in fields else {}) | kinds | wanted)
            small = miniature(config)
        except Exception as error:  # noqa: BLE001 - the next depth may be one that it takes
            last = error
            continue
        for key, value in {**IDS, "vocab_size": VOCAB}.items():
            setattr(small, key, value)
        return small
    assert last is not None
    raise last


def _kinds(family: type[PreTrainedConfig]) -> dict[str, list[str]]:
    """Return one layer of each kind, or nothing where there is but one kind."""
    kinds = list(dict.fromkeys(getattr(family(), "layer_types", None) or ()))
    return {"layer_types": kinds} if len(kinds) > 1 else {}
