"""Configurations of transformers models: family, keys, sizes and text part.

Students and teachers trained from scratch take the same keys. A key that the configuration class
would store without using it is refused by name.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
)

from pipeline.errors import ConfigError, IncompatibleError, in_short
from pipeline.tasks import models_language

NOT_ARCHITECTURE = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "model_type"),
        *("transformers_version", "quantization_config", "problem_type", "num_labels"),
        *("id2label", "label2id", "output_hidden_states", "output_attentions", "return_dict"),
    }
)
"""Keys of a `config.json` that describe a file, a task or a call, not the architecture."""
ROPE_KEYS = ("rope_theta", "rope_scaling", "partial_rotary_factor")
"""Separate keys of older configurations that newer ones group in `rope_parameters`."""


def auto_class(task: str) -> Any:
    """Return the transformers auto class with the head of a task."""
    return AutoModelForCausalLM if models_language(task) else AutoModelForSequenceClassification


def require_head(config: PreTrainedConfig, task: str, where: str) -> None:
    """Refuse a family for which transformers has no model with the head of a task.

    Raises:
        IncompatibleError: Naming the family.
    """
    mapping = (
        MODEL_FOR_CAUSAL_LM_MAPPING
        if models_language(task)
        else MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    )
    if type(config) not in mapping:
        raise IncompatibleError(
            f"{where}: transformers has no {task} model of type {config.model_type}; choose "
            "another family"
        )


def family_of(model_type: Any, where: str = "model") -> type[PreTrainedConfig]:
    """Return the configuration class of a family; only transformers' own families are supported.

    Raises:
        IncompatibleError: If the installed transformers does not have it.
    """
    if model_type not in CONFIG_MAPPING:
        raise IncompatibleError(
            f"{where}: model_type is {model_type!r}, which the installed transformers does not "
            "have; use a version that has it, or choose a model that needs no code of its own"
        )
    return CONFIG_MAPPING[model_type]


def plain_values(value: Any) -> Any:
    """Return the values of a `config.json` with `{"__float__": "Infinity"}` decoded to a float.

    Raises:
        ValueError: If a `__float__` is not a number.
    """
    if isinstance(value, Mapping):
        if set(value) == {"__float__"}:
            return float(value["__float__"])
        return {key: plain_values(item) for key, item in value.items()}
    return [plain_values(item) for item in value] if isinstance(value, (list, tuple)) else value


def make_configuration(
    family: type[PreTrainedConfig], values: Mapping[str, Any], where: str
) -> PreTrainedConfig:
    """Build a configuration; an error of its class becomes a one-line ConfigError.

    Raises:
        ConfigError: If the class refuses a value.
    """
    try:
        return family(**plain_values(values))
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{where}: {family.__name__} refuses it ({in_short(error)}); change the key it names"
        ) from error


def text_part(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return the part of a configuration that describes the language model.

    A multimodal model has a separate text configuration; any other configuration is returned
    unchanged.
    """
    try:
        text = config.get_text_config()
    except ValueError:  # two text configurations: an encoder and a decoder
        return config
    return text if text.model_type in CONFIG_MAPPING else config


def size_of(config: PreTrainedConfig, key: str) -> int:
    """Return a size that is a positive integer; 0 if the family has no such key."""
    try:
        value = getattr(config, key, None)
    except RuntimeError:  # Gemma-4: differs between kinds of layers
        return 0
    return value if isinstance(value, int) and value > 0 else 0


def key_heads(config: PreTrainedConfig) -> int:
    """Return the number of key heads of an attention layer; 0 without attention heads."""
    heads = size_of(config, "num_attention_heads")
    # Falcon uses its number of key heads only in the new decoder architecture.
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return min(heads, 1)
    return size_of(config, "num_key_value_heads") or size_of(config, "num_kv_heads") or heads


def head_width(config: PreTrainedConfig) -> int:
    """Return the width of an attention head in channels; 0 without attention heads."""
    heads = size_of(config, "num_attention_heads")
    return size_of(config, "head_dim") or (size_of(config, "hidden_size") // heads if heads else 0)


def settable_keys(family: type[PreTrainedConfig]) -> set[str]:
    """Return the architecture keys that can be set: fields of the class and their aliases.

    Values that a class computes from other keys (Falcon's `head_dim`) are not fields.
    """
    keys = {field.name for field in dataclasses.fields(family)} | set(family.attribute_map)
    if "rope_parameters" in keys:
        keys |= set(ROPE_KEYS)
    return keys - NOT_ARCHITECTURE


def check_keys(family: type[PreTrainedConfig], keys: Iterable[str], where: str) -> None:
    """Refuse keys that the class would store without using them, and keys given under two names.

    Args:
        family: The configuration class.
        keys: The given keys; `model_type` is allowed.
        where: The parameter that holds the keys, for the message.

    Raises:
        ConfigError: Naming the key.
    """
    given, settable = set(keys), settable_keys(family)
    for key in sorted(given - settable - {"model_type"}):
        close = difflib.get_close_matches(key, settable, n=1)
        advice = f"did you mean {close[0]!r}?" if close else "remove it"
        raise ConfigError(
            f"{where}.{key}: no key of an architecture in {family.__name__}; {advice}"
        )
    for key in sorted(given):
        if family.attribute_map.get(key) in given:
            raise ConfigError(
                f"{where}.{key}: in {family.__name__} the same as "
                f"{family.attribute_map[key]!r}, which is given too; remove one"
            )


def set_rope(values: dict[str, Any], given: dict[str, Any]) -> None:
    """Move rotary keys from `given` into the inherited `rope_parameters` of `values`, in place.

    Configuration classes read the older separate keys only if `rope_parameters` is missing.
    """
    parameters = values.get("rope_parameters")
    if not isinstance(parameters, dict) or "rope_parameters" in given:
        return
    # Gemma-3 has separate parameters, with its own keys, for each kind of layer.
    if any(isinstance(value, dict) for value in parameters.values()):
        return
    scaling = given.pop("rope_scaling", None)
    values["rope_parameters"] = {
        **parameters,
        **(scaling or {}),
        **{key: given.pop(key) for key in ("rope_theta", "partial_rotary_factor") if key in given},
    }
