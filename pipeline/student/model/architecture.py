"""The student's configuration: the teacher's, with the keys that `params.yaml` changes.

Keys that belong to the tokenizer (vocabulary, special ids) never change: the ids in the store would
mean something else to the student. Keys that depend on a changed key (head width, key heads, lists
with an entry for each layer) are adapted to it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from transformers import PreTrainedConfig

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.student.align.layer_maps import block_choice
from pipeline.taps.configuration import (
    NOT_ARCHITECTURE,
    auto_class,
    check_keys,
    family_of,
    make_configuration,
    set_rope,
    settable_keys,
    size_of,
    text_part,
)
from pipeline.taps.row_length import longest_row

TOKENIZER_KEYS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")


def teacher_configuration(teacher_config: Mapping[str, Any]) -> PreTrainedConfig:
    """Read the teacher's `config.json`; if the model also reads images, only the text part.

    Raises:
        IncompatibleError: If the installed transformers does not know its model type.
    """
    family = family_of(teacher_config.get("model_type"))
    values = {key: value for key, value in teacher_config.items() if key not in NOT_ARCHITECTURE}
    return text_part(make_configuration(family, values, "teacher config"))


def student_configuration(
    architecture: Mapping[str, Any],
    teacher: PreTrainedConfig,
    *,
    vocab: int,
    layer_choice: Literal["uniform"] | Sequence[int] = "uniform",
) -> PreTrainedConfig:
    """Return the teacher's configuration with the keys of `architecture` in place of its own.

    With another `model_type` only vocabulary, special ids and the longest position are inherited;
    everything else has that family's defaults. Labels and the weights' dtype are not inherited.

    Args:
        architecture: Keys of the configuration class, under its common or its own names.
        teacher: The teacher's configuration.
        vocab: Length of the teacher's tokenizer.
        layer_choice: The teacher block that each student block replaces; it picks the entries of
            lists with an entry for each layer, such as `layer_types`.

    Raises:
        ConfigError: If a key is unknown to the class, or its value is invalid.
        IncompatibleError: If the vocabulary or a special id is not the teacher's.
    """
    family = family_of(architecture.get("model_type", teacher.model_type))
    own_name = family.attribute_map
    given = {
        own_name.get(key, key): value for key, value in architecture.items() if key != "model_type"
    }
    check_keys(family, architecture, "model.architecture")
    if family.model_type == teacher.model_type:
        values = {
            key: value for key, value in teacher.to_dict().items() if key not in NOT_ARCHITECTURE
        }
        set_rope(values, given)
    else:
        common = (*TOKENIZER_KEYS, "max_position_embeddings")
        inherited = {key: getattr(teacher, key, None) for key in common}
        known = settable_keys(family)
        values = {own_name.get(key, key): inherited[key] for key in common if key in known}
    layer_lists = _layer_lists(values, teacher.num_hidden_layers)
    values = {key: value for key, value in values.items() if key not in layer_lists}
    config = make_configuration(family, values | given, "model.architecture")
    if family.model_type == teacher.model_type:
        derived = _derived(config, teacher, layer_lists, layer_choice)
        # Keys that the class computes itself must not be set.
        derived = {key: value for key, value in derived.items() if key in settable_keys(family)}
        config = make_configuration(family, values | derived | given, "model.architecture")
    _check_heads(config)
    check_vocabulary(config, teacher, vocab, "model.architecture")
    return config


def keep_room(
    config: PreTrainedConfig,
    teacher: PreTrainedConfig,
    task: str,
    architecture: Mapping[str, Any],
) -> None:
    """Enlarge an inherited position table that holds fewer tokens in the student's family.

    RoBERTa needs two positions more than BERT for rows of the same length.
    """
    common = "max_position_embeddings"
    is_given = common in architecture or config.attribute_map.get(common) in architecture
    if is_given or config.model_type == teacher.model_type:
        return
    try:
        with torch.device("meta"):
            room = longest_row(auto_class(task).from_config(config))
    except (ValueError, RuntimeError, AssertionError):
        return  # building the student will say why it cannot be built
    if room is not None and room < config.max_position_embeddings:
        config.max_position_embeddings += config.max_position_embeddings - room


def check_vocabulary(
    config: PreTrainedConfig, teacher: PreTrainedConfig, vocab: int, where: str
) -> None:
    """Refuse a student whose vocabulary or special ids are not the teacher's.

    Args:
        config: The student's configuration.
        teacher: The teacher's configuration. Its embedding may have more rows than the tokenizer
            has ids; the student's must have as many, for logits are compared column by column.
        vocab: Length of the teacher's tokenizer.
        where: The key or file at fault, for the message.

    Raises:
        IncompatibleError: If the sizes of the embeddings or the special ids differ, or the
            embedding has fewer rows than the tokenizer has ids.
    """
    if not size_of(teacher, "vocab_size"):
        raise IncompatibleError(
            f"the teacher's family, {teacher.model_type}, has no vocabulary, expected one of token "
            "ids; choose another teacher"
        )
    if teacher.vocab_size < vocab:
        raise IncompatibleError(
            f"the teacher's tokenizer has {vocab} ids, its embedding {teacher.vocab_size} rows; "
            "use the tokenizer that the teacher was trained with"
        )
    if (own := size_of(config, "vocab_size")) != teacher.vocab_size:
        raise IncompatibleError(
            f"{where}: vocab_size is {own or 'missing'}, the teacher's {teacher.vocab_size}; "
            "a student shares its teacher's vocabulary"
        )
    for key in TOKENIZER_KEYS[1:]:
        own_id, expected = getattr(config, key, None), getattr(teacher, key, None)
        if own_id != expected:
            raise IncompatibleError(
                f"{where}: {key} is {own_id}, the teacher's {expected}; "
                "leave it out, it is inherited"
            )


def _layer_lists(values: Mapping[str, Any], depth: int) -> dict[str, list[Any]]:
    """Return the values with an entry for each layer: layer_types, mlp_layer_types, and so on.

    They are recognised by their length, not by a list of names. They cannot be inherited as they
    are: the class refuses a list whose length is not the student's depth.
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
    """Return the values in the teacher's file that depend on changed keys."""
    derived: dict[str, Any] = {}
    heads, own = size_of(teacher, "num_attention_heads"), size_of(config, "num_attention_heads")
    if heads and own:
        if size_of(teacher, "head_dim") == teacher.hidden_size // heads:
            derived["head_dim"] = config.hidden_size // own
        for key in ("num_key_value_heads", "num_kv_heads"):
            if size_of(teacher, key) == heads:
                derived[key] = own
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
    """Refuse head counts that torch would refuse later, with a clearer message."""
    width, heads = config.hidden_size, size_of(config, "num_attention_heads")
    if not heads:
        return
    if size_of(config, "head_dim") in (0, width // heads) and width % heads:
        raise ConfigError(
            f"model.architecture: hidden_size {width} is no multiple of num_attention_heads "
            f"{heads}; change one, or give head_dim"
        )
    key_heads = size_of(config, "num_key_value_heads")
    if key_heads and heads % key_heads:
        raise ConfigError(
            f"model.architecture: num_attention_heads {heads} is no multiple of "
            f"num_key_value_heads {key_heads}; give num_key_value_heads too"
        )
