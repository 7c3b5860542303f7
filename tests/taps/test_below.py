"""One block alone: the query and key of the whole model, from few of its parameters."""

import pytest
import torch

from pipeline.errors import IncompatibleError
from pipeline.taps.below import QueryKeyBlock, query_key_parameters
from pipeline.taps.tap import tap
from tests.tiny import tiny_batch, tiny_model

USED = {
    "llama": {"input_layernorm.weight", *(f"self_attn.{x}_proj.weight" for x in "qkv")},
    "qwen3": {
        "input_layernorm.weight", *(f"self_attn.{x}_proj.weight" for x in "qkv"),
        "self_attn.q_norm.weight", "self_attn.k_norm.weight",
    },
    "gpt2": {"ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias"},
    "bert": {
        f"attention.self.{name}.{part}"
        for name in ("query", "key", "value")
        for part in ("weight", "bias")
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", USED)
def test_the_parameters_are_those_before_the_attention_function(kind):
    assert set(query_key_parameters(tiny_model(kind), 2)) == USED[kind]


@pytest.mark.parametrize("kind", [*USED, "gpt_neox", "roberta", "distilbert", "mistral", "cohere"])
def test_a_block_alone_says_what_the_model_says(kind):
    """At every position of ragged rows, for the first block and the last."""
    options = {"sliding_window": 64} if kind == "mistral" else {}
    model, batch = tiny_model(kind, layers=3, **options), tiny_batch([9, 4, 1])
    live = batch["attention_mask"].bool()
    with torch.no_grad(), tap(model, hidden=[0, 2], attention=[1, 3]) as record:
        model(**batch)
    for layer in (1, 3):
        parameters = query_key_parameters(model, layer)
        block = QueryKeyBlock(model.config.to_dict(), layer, parameters)
        padded = record.hidden[layer - 1].masked_fill(~live[..., None], 7.0)
        query, key = block(padded)
        for ours, theirs in ((query, record.query[layer]), (key, record.key[layer])):
            ours, theirs = (x.transpose(1, 2)[live] for x in (ours, theirs))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_does_not_run_takes_no_memory():
    model = tiny_model("llama")
    block = QueryKeyBlock(model.config.to_dict(), 1, query_key_parameters(model, 1))
    held = {name for name, p in block._block.named_parameters() if p.numel()}
    assert held == USED["llama"]


def test_it_is_made_without_touching_anybodys_random_numbers():
    model = tiny_model("bert")
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    QueryKeyBlock(model.config.to_dict(), 1, query_key_parameters(model, 1))
    assert torch.equal(before, torch.random.get_rng_state())


def test_parameters_of_another_shape_or_name_are_refused():
    model = tiny_model("llama")
    config, found = model.config.to_dict(), query_key_parameters(model, 1)
    with pytest.raises(IncompatibleError, match=r"q_proj\.weight has shape \[3\], .* \[32, 32\]"):
        QueryKeyBlock(config, 1, found | {"self_attn.q_proj.weight": torch.zeros(3)})
    with pytest.raises(IncompatibleError, match=r"other has shape \[3\], the installed .* none"):
        QueryKeyBlock(config, 1, found | {"other": torch.zeros(3)})
    with pytest.raises(IncompatibleError, match=r"model_type is 'novel'.*form qk"):
        QueryKeyBlock(config | {"model_type": "novel"}, 1, found)
