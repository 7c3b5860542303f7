"""Configuration of a teacher that is trained from scratch, for its tokenizer and task."""

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.taps.configuration import check_keys, family_of, make_configuration
from pipeline.teacher.source.load import head_options


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
        scratch: `model_type` and keys of its Hugging Face configuration.
        task: The task of its head.
        classes: Names of the classes.
        vocab: Number of ids of the tokenizer.
        pad_id: The padding id.
        key: `teachers.T`, for the error.

    Raises:
        ConfigError: If transformers has no such family, the family does not know a key, or its
            configuration class refuses a value.
    """
    where = f"{key}.model.scratch"
    try:
        family = family_of(scratch["model_type"], where)
    except IncompatibleError as error:  # here the name comes from the parameters
        raise ConfigError(str(error)) from error
    check_keys(family, scratch, where)
    keys = {name: value for name, value in scratch.items() if name != "model_type"}
    ids = {"vocab_size": vocab, "pad_token_id": pad_id, "bos_token_id": None, "eos_token_id": None}
    config = make_configuration(family, {**ids, **keys}, where)
    for name, value in head_options(task, classes).items():
        setattr(config, name, value)
    return config
