"""How many tokens a row may have: what the rule says, a model runs, and not one more."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    CamembertConfig,
    GPT2Config,
    IBertConfig,
    LongformerConfig,
    MPNetConfig,
    OPTConfig,
    PreTrainedConfig,
    RobertaConfig,
    XLMRobertaConfig,
    XLNetConfig,
)

from pipeline.errors import IncompatibleError
from pipeline.taps.configuration import auto_class
from pipeline.taps.row_length import longest_row, require_room

ENCODER = {
    "vocab_size": 32,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    "max_position_embeddings": 20,
}
PAD_FIRST = [
    RobertaConfig(**ENCODER, pad_token_id=1),
    RobertaConfig(**ENCODER, pad_token_id=0),
    XLMRobertaConfig(**ENCODER, pad_token_id=1),
    CamembertConfig(**ENCODER, pad_token_id=1),
    IBertConfig(**ENCODER, pad_token_id=1),
    MPNetConfig(**ENCODER, pad_token_id=1),
    LongformerConfig(**ENCODER, pad_token_id=1, attention_window=[4]),
]
"""Families whose positions start behind the padding id."""
PLAIN = [
    BertConfig(**ENCODER, pad_token_id=1),
    GPT2Config(vocab_size=32, n_embd=16, n_layer=1, n_head=2, n_positions=20),
    OPTConfig(
        vocab_size=32,
        hidden_size=16,
        word_embed_proj_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        ffn_dim=16,
        max_position_embeddings=20,
    ),
]


def runs(config: PreTrainedConfig, tokens: int) -> bool:
    config.pad_token_id = config.pad_token_id or 0
    model = auto_class("classification").from_config(config).eval()
    # No id is the one of padding, nor one that stands for the end of a text.
    ids = torch.full((1, tokens), 7)
    try:
        with torch.no_grad():
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
    except (IndexError, RuntimeError):
        return False
    return True


@pytest.mark.parametrize(
    "config", [*PAD_FIRST, *PLAIN], ids=lambda c: f"{c.model_type}-{c.pad_token_id}"
)
def test_the_longest_row_runs_and_a_longer_one_does_not(config):
    with torch.device("meta"):
        longest = longest_row(auto_class("classification").from_config(config))
    expected = 20 if config in PLAIN else 20 - config.pad_token_id - 1
    assert longest == expected
    assert runs(config, longest)
    # Longformer fills a row up to whole windows, beyond its table.
    assert not runs(config, longest + 1)


def test_minus_one_is_no_limit():
    config = XLNetConfig(vocab_size=32, d_model=16, n_layer=1, n_head=2, d_inner=16)
    assert config.max_position_embeddings == -1
    model = AutoModelForCausalLM.from_config(config)
    assert longest_row(model) is None
    require_room(model, 10_000, "students.a")


def test_both_numbers_are_named():
    model = auto_class("classification").from_config(PAD_FIRST[0])
    require_room(model, 18, "students.a.model")
    match = "students.a.model: rows may have 19 tokens, RobertaForSequenceClassification takes 18"
    with pytest.raises(IncompatibleError, match=match):
        require_room(model, 19, "students.a.model")
