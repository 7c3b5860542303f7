"""A teacher that is to be built here: its configuration, on the tokenizer it gets."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from pipeline.errors import ConfigError, in_short
from pipeline.teacher.load import head_options


def scratch_config(
    scratch: Mapping[str, Any],
    *,
    task: str,
    classes: tuple[str, ...],
    vocab: int,
    pad_id: int,
    key: str,
) -> PreTrainedConfig:
    """Return the configuration of a new teacher.

    Args:
        scratch: `model_type` and its Hugging Face keys.
        task: What its head is for.
        classes: Names of the classes.
        vocab: Ids of the tokenizer.
        pad_id: The padding id.
        key: `teachers.T`, for the error.

    Raises:
        ConfigError: If the keys make no configuration, or one of them means nothing to it.
    """
    known = {name: value for name, value in scratch.items() if name != "model_type"}
    ids = {"vocab_size": vocab, "pad_token_id": pad_id, "bos_token_id": None, "eos_token_id": None}
    try:
        config = AutoConfig.for_model(scratch["model_type"], **{**ids, **known})
    except (KeyError, ValueError, TypeError, StrictDataclassError) as error:
        raise ConfigError(
            f"{key}.model.scratch: no configuration ({in_short(error)}); expected model_type and "
            "its Hugging Face keys"
        ) from error
    plain = type(config)().to_dict()
    for name in known:
        if name not in plain and name not in config.attribute_map:
            raise ConfigError(
                f"{key}.model.scratch.{name}: {type(config).__name__} has no such key; remove it"
            )
    for name, value in head_options(task, classes).items():
        setattr(config, name, value)
    return config
