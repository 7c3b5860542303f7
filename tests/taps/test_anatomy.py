import pytest
from torch import nn
from transformers import T5Config, T5ForConditionalGeneration

from pipeline.errors import IncompatibleError
from pipeline.taps.anatomy import find_anatomy
from tests.tiny import tiny_model


@pytest.mark.parametrize(
    ("kind", "path", "is_causal", "kv_heads"),
    [
        ("llama", "model.layers", True, 2),
        ("qwen3", "model.layers", True, 2),
        ("gpt2", "transformer.h", True, 4),
        ("gpt_neox", "gpt_neox.layers", True, 4),
        ("gpt_oss", "model.layers", True, 2),
        ("bert", "bert.encoder.layer", False, 4),
        ("distilbert", "distilbert.transformer.layer", False, 4),
        ("deberta_v2", "deberta.encoder.layer", False, 4),
    ],
)
def test_finds_blocks_and_sizes(kind, path, is_causal, kv_heads):
    model = tiny_model(kind, layers=3)
    anatomy = find_anatomy(model)
    assert (anatomy.path, anatomy.is_causal, anatomy.kv_heads) == (path, is_causal, kv_heads)
    assert (anatomy.depth, anatomy.width, anatomy.heads, anatomy.head_dim) == (3, 32, 4, 8)
    assert anatomy.blocks == tuple(model.get_submodule(path))
    assert anatomy.head is model.get_output_embeddings()


def test_experts_inside_blocks_are_not_the_stack():
    model = tiny_model("llama", layers=2)
    model.model.layers[0].experts = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    assert find_anatomy(model).path == "model.layers"


def test_every_parameter_belongs_to_its_block():
    model = tiny_model("gpt2", layers=2)
    anatomy = find_anatomy(model)
    for name, parameter in model.named_parameters():
        owners = [
            layer
            for layer, block in enumerate(anatomy.blocks, start=1)
            if any(parameter is own for own in block.parameters())
        ]
        assert anatomy.block_of(name) == (owners[0] if owners else None)


def test_layers_out_of_range_name_the_model_and_its_range():
    anatomy = find_anatomy(tiny_model("llama", layers=2))
    anatomy.require_layers(hidden=[0, 2], attention=[1, 2])
    with pytest.raises(IncompatibleError, match=r"layer 12 asked for, LlamaForCausalLM has 0\.\.2"):
        anatomy.require_layers(hidden=[1, 12])
    with pytest.raises(IncompatibleError, match=r"layer 0 asked for, LlamaForCausalLM has 1\.\.2"):
        anatomy.require_layers(attention=[0])
    with pytest.raises(IncompatibleError, match="layer -1 asked for"):
        anatomy.require_layers(hidden=[-1])


def test_models_without_one_stack_are_refused_by_name():
    config = T5Config(
        vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    with pytest.raises(IncompatibleError, match="T5ForConditionalGeneration is an encoder-decoder"):
        find_anatomy(T5ForConditionalGeneration(config))
    model = tiny_model("llama", layers=2)
    model.model.others = nn.ModuleList([nn.Identity(), nn.Identity()])
    with pytest.raises(
        IncompatibleError, match=r"LlamaForCausalLM: .*model\.layers, model\.others"
    ):
        find_anatomy(model).require_layers(hidden=[1])


def test_layers_that_share_a_block_are_refused_and_outputs_are_not():
    model = tiny_model("llama", layers=2)
    model.model.layers[1] = model.model.layers[0]
    anatomy = find_anatomy(model)
    assert (anatomy.depth, anatomy.width, anatomy.blocks) == (2, 32, ())
    anatomy.require_layers()
    for asked in ({"hidden": [1]}, {"attention": [2]}):
        with pytest.raises(IncompatibleError, match="repeats one block"):
            anatomy.require_layers(**asked)
