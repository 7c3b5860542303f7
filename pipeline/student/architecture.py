"""The student's configuration: the teacher's, with the keys that `params.yaml` changes.

What a tokenizer fixes (vocabulary, special ids) is never changed, or rows of the store would mean
something else to the student. What follows from a changed key (head width, key heads, lists with
an entry for each layer) follows it.
"""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PreTrainedConfig

from pipeline.errors import ConfigError, IncompatibleError, in_short
from pipeline.student.maps import block_choice

TOKENIZER_KEYS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
NOT_ARCHITECTURE = frozenset(
    {
        *("_name_or_path", "architectures", "auto_map", "dtype", "torch_dtype", "model_type"),
        *("transformers_version", "quantization_config", "problem_type", "num_labels"),
        *("id2label", "label2id", "output_hidden_states", "output_attentions", "return_dict"),
    }
)
"""Keys of a `config.json` that describe a file, a task or a call instead of an architecture."""


def teacher_configuration(teacher_config: Mapping[str, Any]) -> PreTrainedConfig:
    """Read the teacher's `config.json`.

    Raises:
        IncompatibleError: If the installed transformers does not know its model type.
    """
    return _make(_family(teacher_config.get("model_type")), dict(teacher_config), "teacher config")


def student_configuration(
    architecture: Mapping[str, Any],
    teacher: PreTrainedConfig,
    *,
    vocab: int,
    layer_choice: Literal["uniform"] | Sequence[int] = "uniform",
) -> PreTrainedConfig:
    """Return the teacher's configuration with the keys of `architecture` in place of its own.

    With another `model_type` only vocabulary, special ids and the longest position are
    inherited, all else are that family's defaults. Neither labels nor weights' dtype are carried.

    Args:
        architecture: Keys of the configuration class; its common and its own names both hold.
        teacher: The teacher's configuration.
        vocab: Length of the teacher's tokenizer.
        layer_choice: The teacher block that each student block stands for; lists with an entry for
            each layer, such as `layer_types`, are picked by it.

    Raises:
        ConfigError: If a key is unknown to the class, or its value makes no model.
        IncompatibleError: If the vocabulary or a special id is not the teacher's.
    """
    family = _family(architecture.get("model_type", teacher.model_type))
    own_name = family.attribute_map
    given = {
        own_name.get(key, key): value for key, value in architecture.items() if key != "model_type"
    }
    _check_keys(family, architecture)
    if family.model_type == teacher.model_type:
        values = {
            key: value for key, value in teacher.to_dict().items() if key not in NOT_ARCHITECTURE
        }
        if "rope_theta" in given and isinstance(values.get("rope_parameters"), dict):
            values["rope_parameters"] |= {"rope_theta": given.pop("rope_theta")}
    else:
        common = (*TOKENIZER_KEYS, "max_position_embeddings")
        inherited = {key: getattr(teacher, key, None) for key in common}
        known = _known_keys(family)
        values = {own_name.get(key, key): inherited[key] for key in common if key in known}
    layer_lists = _layer_lists(values, teacher.num_hidden_layers)
    values = {key: value for key, value in values.items() if key not in layer_lists}
    config = _make(family, values | given, "model.architecture")
    if family.model_type == teacher.model_type:
        derived = _derived(config, teacher, layer_lists, layer_choice)
        config = _make(family, values | derived | given, "model.architecture")
    _check_heads(config)
    check_vocabulary(config, teacher, vocab, "model.architecture")
    return config


def check_vocabulary(
    config: PreTrainedConfig, teacher: PreTrainedConfig, vocab: int, where: str
) -> None:
    """Refuse a student that would read or predict other ids than the teacher.

    Args:
        config: The student's configuration.
        teacher: The teacher's configuration. Its embedding may have more rows than the tokenizer
            has ids; the student's must have as many, for logits are compared column by column.
        vocab: Length of the teacher's tokenizer.
        where: The key or file at fault, for the message.

    Raises:
        IncompatibleError: If rows or special ids differ, or are fewer than the tokenizer's ids.
    """
    if teacher.vocab_size < vocab:
        raise IncompatibleError(
            f"the teacher's tokenizer has {vocab} ids, its embedding {teacher.vocab_size} rows; "
            "use the tokenizer that the teacher was trained with"
        )
    if config.vocab_size != teacher.vocab_size:
        raise IncompatibleError(
            f"{where}: vocab_size is {config.vocab_size}, the teacher's {teacher.vocab_size}; "
            "a student shares its teacher's vocabulary"
        )
    for key in TOKENIZER_KEYS[1:]:
        found, expected = getattr(config, key, None), getattr(teacher, key, None)
        if found != expected:
            raise IncompatibleError(
                f"{where}: {key} is {found}, the teacher's {expected}; "
                "leave it out, it is inherited"
            )


def _family(model_type: Any) -> type[PreTrainedConfig]:
    """Find the configuration class; code from outside transformers is never looked for."""
    if model_type not in CONFIG_MAPPING:
        raise IncompatibleError(
            f"model_type is {model_type!r}, which the installed transformers does not have; "
            "choose one that needs no code of its own"
        )
    return CONFIG_MAPPING[model_type]


def _make(family: type[PreTrainedConfig], values: dict[str, Any], where: str) -> PreTrainedConfig:
    """Instantiate a configuration; what its class refuses becomes one line."""
    values = {key: value for key, value in values.items() if key not in NOT_ARCHITECTURE}
    try:
        return family(**values)
    except (StrictDataclassError, ValueError, TypeError) as error:
        reason = in_short(error)
        raise ConfigError(
            f"{where}: {family.__name__} refuses it ({reason}); change the key it names"
        ) from error


def _known_keys(family: type[PreTrainedConfig]) -> set[str]:
    """Collect what may be set; `rope_theta` is no field any more but still the word for it."""
    known = {field.name for field in dataclasses.fields(family)} | set(family.attribute_map)
    if "rope_parameters" in known:
        known.add("rope_theta")
    return known - NOT_ARCHITECTURE


def _check_keys(family: type[PreTrainedConfig], architecture: Mapping[str, Any]) -> None:
    """Refuse keys that the class would keep as an attribute nobody reads."""
    known = _known_keys(family)
    for key in architecture:
        if key in known or key == "model_type":
            continue
        close = difflib.get_close_matches(key, known, n=1)
        advice = f"did you mean {close[0]!r}?" if close else "remove it"
        raise ConfigError(
            f"model.architecture.{key}: no key of an architecture in {family.__name__}; {advice}"
        )
    named_twice = [key for key in architecture if family.attribute_map.get(key) in architecture]
    if named_twice:
        key = named_twice[0]
        raise ConfigError(
            f"model.architecture.{key}: in {family.__name__} the same as "
            f"{family.attribute_map[key]!r}, which is given too; remove one"
        )


def _layer_lists(values: Mapping[str, Any], depth: int) -> dict[str, list[Any]]:
    """Pick the values with an entry for each layer: layer_types, mlp_layer_types, and so on.

    By shape, not by a list of names. They cannot be inherited whole: a list of another length than
    the student's depth is refused by the class.
    """
    return {
        key: value
        for key, value in values.items()
        if "layer" in key and isinstance(value, list) and len(value) == depth
    }


def _derived(
    config: PreTrainedConfig,
    teacher: PreTrainedConfig,
    layer_lists: Mapping[str, list[Any]],
    layer_choice: Literal["uniform"] | Sequence[int],
) -> dict[str, Any]:
    """Values that the teacher's file spells out but that follow from keys which were changed."""
    derived: dict[str, Any] = {}
    width, heads = teacher.hidden_size, teacher.num_attention_heads
    if getattr(teacher, "head_dim", None) == width // heads:
        derived["head_dim"] = config.hidden_size // config.num_attention_heads
    if getattr(teacher, "num_key_value_heads", None) == heads:
        derived["num_key_value_heads"] = config.num_attention_heads
    choice = block_choice(
        layer_choice,
        student_layers=config.num_hidden_layers,
        teacher_layers=teacher.num_hidden_layers,
    )
    for key, value in layer_lists.items():
        derived[key] = [value[block - 1] for block in choice]
    full = getattr(teacher, "max_window_layers", None)  # Qwen: blocks before the first sliding one
    if full is not None:
        derived["max_window_layers"] = sum(block <= full for block in choice)
    return derived


def _check_heads(config: PreTrainedConfig) -> None:
    """Refuse head counts that torch would refuse later, in words of its own."""
    width, heads = config.hidden_size, config.num_attention_heads
    if getattr(config, "head_dim", None) in (None, width // heads) and width % heads:
        raise ConfigError(
            f"model.architecture: hidden_size {width} is no multiple of num_attention_heads "
            f"{heads}; change one, or give head_dim"
        )
    key_heads = getattr(config, "num_key_value_heads", None)
    if key_heads and heads % key_heads:
        raise ConfigError(
            f"model.architecture: num_attention_heads {heads} is no multiple of "
            f"num_key_value_heads {key_heads}; give num_key_value_heads too"
        )
