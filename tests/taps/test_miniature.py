"""What a miniature says of a model before its weights are loaded."""

import pytest
import torch
from transformers import (
    AlbertConfig,
    BloomConfig,
    FalconConfig,
    FNetConfig,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    RobertaConfig,
    T5Config,
)

from pipeline.errors import IncompatibleError
from pipeline.taps.check import TapRequest
from pipeline.taps.miniature import build_miniature, check_in_miniature, miniature
from tests.tiny import tiny_config

LARGE = [
    LlamaConfig(hidden_size=4096, num_hidden_layers=3, num_key_value_heads=8),
    MistralConfig(num_hidden_layers=2),
    GPTNeoXConfig(num_hidden_layers=2),
    FalconConfig(num_hidden_layers=2),
    Mamba2Config(num_hidden_layers=2),
    Phi3Config(
        num_hidden_layers=2,
        max_position_embeddings=8192,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0] * 48,
            "long_factor": [2.0] * 48,
            "original_max_position_embeddings": 4096,
        },
    ),
]


@pytest.mark.parametrize("config", LARGE, ids=lambda c: c.model_type)
def test_a_model_of_any_size_becomes_small_and_keeps_its_choices(config):
    model = build_miniature(config, "causal-lm")
    assert sum(p.numel() for p in model.parameters()) < 3e6
    small = model.config
    assert type(small) is type(config)
    for key in ("num_hidden_layers", "max_position_embeddings", "sliding_window"):
        assert getattr(small, key, None) == getattr(config, key, None)
    assert config.hidden_size > small.hidden_size


def test_the_padding_id_stays_because_positions_may_start_behind_it():
    assert miniature(RobertaConfig(pad_token_id=1)).pad_token_id == 1
    assert miniature(LlamaConfig(pad_token_id=31_999)).pad_token_id == 0


def test_the_random_state_is_left_alone():
    before = torch.random.get_rng_state()
    build_miniature(tiny_config("llama"), "causal-lm")
    assert torch.equal(torch.random.get_rng_state(), before)


def check(config, task="causal-lm", max_length=16, blocks=False, **taps):
    return check_in_miniature(
        *(config, task, TapRequest(**taps)),
        where="teachers.main",
        max_length=max_length,
        blocks=blocks,
    )


def test_what_can_be_had_passes():
    report = check(
        LlamaConfig(num_hidden_layers=2), hidden=[0, 1, 2], attention=[1], values=[2], head=True
    )
    assert report is not None
    assert report.causal
    assert check(MambaConfig(num_hidden_layers=2), hidden=[0, 2], head=True) is not None
    assert check(AlbertConfig(num_hidden_layers=2), "classification") is not None


@pytest.mark.parametrize(
    ("config", "asked", "match"),
    [
        (
            MambaConfig(num_hidden_layers=2),
            {"attention": [1]},
            "teachers.main: MambaForCausalLM has no attention heads, attention asked for in layer",
        ),
        (
            BloomConfig(n_layer=2),
            {"attention": [1]},
            "BloomForCausalLM computes attention outside transformers' AttentionInterface",
        ),
        (LlamaConfig(num_hidden_layers=2), {"max_length": 4000}, "rows may have 4000 tokens"),
        (T5Config(), {}, "t5 is an encoder-decoder, expected a model with one stack"),
        (
            MistralConfig(num_hidden_layers=1, sliding_window=8),
            {"attention": [1]},
            "teachers.main: .* sliding window of 8 tokens|window",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", None),
)
def test_what_cannot_is_refused_in_one_line(config, asked, match):
    with pytest.raises(IncompatibleError, match=match) as error:
        check(config, **asked)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"hidden": [1]}, "one list of 3 transformer blocks .*only its outputs can be used"),
        ({"blocks": True}, "only its outputs can be used"),
    ],
)
def test_layers_that_share_one_block_have_no_layers_to_offer(asked, match):
    with pytest.raises(IncompatibleError, match=match):
        check(AlbertConfig(num_hidden_layers=3), "classification", **asked)


def test_a_model_that_ignores_the_mask_is_refused():
    with pytest.raises(IncompatibleError, match="FNetForSequenceClassification: states of a row"):
        check(FNetConfig(num_hidden_layers=2), "classification")


def broken(*_, **__):
    raise RuntimeError("the sizes do not fit")


def broken_miniature(config, task):
    model = build_miniature(config, task)

    def forward(input_ids=None, attention_mask=None):
        broken()

    model.forward = forward
    return model


def test_a_miniature_that_does_not_run_says_nothing_of_the_model(monkeypatch):
    config = LlamaConfig(num_hidden_layers=2)
    monkeypatch.setattr("pipeline.taps.miniature.build_miniature", broken_miniature)
    assert check(config, hidden=[1]) is None
    with pytest.raises(IncompatibleError, match="rows may have 4000 tokens"):
        check(config, max_length=4000)
    monkeypatch.setattr("pipeline.taps.miniature.run_base", broken)
    match = r"does not run on rows of text \(the sizes do not fit\)"
    with pytest.raises(IncompatibleError, match=match):
        check(config)


def test_a_model_that_runs_and_cannot_be_tapped_is_refused(monkeypatch):
    monkeypatch.setattr("pipeline.taps.miniature.check_taps", broken)
    match = r"LlamaForCausalLM runs, but not with what is captured from it \(the sizes do not fit\)"
    with pytest.raises(IncompatibleError, match=match):
        check(LlamaConfig(num_hidden_layers=2))
