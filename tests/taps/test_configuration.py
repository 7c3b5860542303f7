"""Configurations: which keys may be set, and which part is about text."""

import json
from math import inf

import pytest
from transformers import (
    BambaConfig,
    FalconConfig,
    Gemma3Config,
    LlamaConfig,
    MusicgenConfig,
    PhiConfig,
)

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.student.model.architecture import teacher_configuration
from pipeline.taps.configuration import (
    check_keys,
    family_of,
    key_heads,
    require_head,
    set_rope,
    text_part,
)
from pipeline.teacher.capture.outline import known_config


def test_a_computed_key_cannot_be_set():
    with pytest.raises(ConfigError, match=r"scratch\.head_dim: no key of an architecture"):
        check_keys(FalconConfig, {"model_type": "falcon", "head_dim": 8}, "scratch")


def test_common_and_own_names_of_a_key_are_known_and_not_both_at_once():
    family = family_of("gpt2")
    check_keys(family, {"n_embd": 8}, "x")
    check_keys(family, {"hidden_size": 8}, "x")
    with pytest.raises(ConfigError, match=r"x\.hidden_size: in GPT2Config the same as 'n_embd'"):
        check_keys(family, {"n_embd": 8, "hidden_size": 8}, "x")


@pytest.mark.parametrize("key", ["dtype", "torch_dtype", "num_labels", "id2label"])
def test_keys_that_describe_no_architecture_are_refused(key):
    with pytest.raises(ConfigError, match=rf"x\.{key}: no key of an architecture"):
        check_keys(LlamaConfig, {key: 1}, "x")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"rope_theta": 5.0}, {"rope_theta": 5.0, "partial_rotary_factor": 0.5}),
        ({"partial_rotary_factor": 0.25}, {"rope_theta": 9.0, "partial_rotary_factor": 0.25}),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            {
                "rope_theta": 9.0,
                "partial_rotary_factor": 0.5,
                "rope_type": "linear",
                "factor": 2.0,
            },
        ),
    ],
)
def test_older_rotary_keys_reach_the_newer_ones(given, expected):
    check_keys(PhiConfig, given, "x")
    values = {"rope_parameters": {"rope_theta": 9.0, "partial_rotary_factor": 0.5}}
    left = dict(given)
    set_rope(values, left)
    assert values == {"rope_parameters": expected}
    assert left == {}


def test_the_text_part_is_the_language_model():
    both = Gemma3Config()
    assert text_part(both).model_type == "gemma3_text"
    assert text_part(text_part(both)) is text_part(both)
    # An encoder and a decoder of text: neither is the language model.
    assert text_part(MusicgenConfig()).model_type == "musicgen"


def test_key_heads_of_either_kind_of_falcon():
    sizes = {"num_attention_heads": 8, "num_kv_heads": 4}
    assert key_heads(FalconConfig(**sizes, multi_query=True)) == 1
    assert key_heads(FalconConfig(**sizes, new_decoder_architecture=True)) == 4
    assert key_heads(FalconConfig(**sizes, multi_query=False)) == 4


def test_a_family_without_the_tasks_head_is_refused():
    require_head(LlamaConfig(), "classification", "teachers.a")
    with pytest.raises(IncompatibleError, match=r"teachers\.a: transformers has no classification"):
        require_head(family_of("mamba")(), "classification", "teachers.a")


def test_infinity_comes_back_from_a_configuration_file():
    config = BambaConfig()
    assert inf in config.time_step_limit
    values = json.loads(config.to_json_string(use_diff=False))
    assert list(known_config(values).time_step_limit) == [0.0, inf]
    assert list(teacher_configuration(values).time_step_limit) == [0.0, inf]
