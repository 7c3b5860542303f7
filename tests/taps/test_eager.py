"""A model's own attention maps, and the model's attention implementation afterwards."""

import pytest
import torch

from pipeline.errors import IncompatibleError
from pipeline.taps.eager import eager_maps
from pipeline.taps.inputs import model_inputs, run_base
from tests.tiny import CAUSAL, tiny_batch, tiny_model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "mistral", "bert", "deberta_v2"])
def test_maps_are_those_that_the_model_shows(kind):
    model, batch = tiny_model(kind, layers=3), tiny_batch([9, 4])
    original = model.config._attn_implementation
    live = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = run_base(model, batch)
        inputs = model_inputs(batch, is_causal=kind in CAUSAL)
        maps, output = eager_maps(model, inputs, [1, 3])
        assert model.config._attn_implementation == original
        if model._can_set_attn_implementation():
            model.set_attn_implementation("eager")
        shown = model(**batch, output_attentions=True).attentions
    assert sorted(maps) == [1, 3]
    for layer, found in maps.items():
        ours, theirs = (x.transpose(1, 2)[live] for x in (found, shown[layer - 1]))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    torch.testing.assert_close(output[live], expected[live], rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was_when_its_pass_fails(monkeypatch):
    model, batch = tiny_model("llama"), tiny_batch([5])

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr(model.model.layers[1].mlp, "forward", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        eager_maps(model, batch, [1])
    assert model.config._attn_implementation == "sdpa"
    assert not any(part._forward_hooks for part in model.modules())


def test_a_layer_without_a_map_is_named(monkeypatch):
    monkeypatch.setattr("pipeline.taps.eager.EAGER", "sdpa")
    with pytest.raises(IncompatibleError, match=r"Llama.*layers \[1, 2\] return no attention map"):
        eager_maps(tiny_model("llama"), tiny_batch([5]), [1, 2])
    with pytest.raises(IncompatibleError, match=r"attention layer 3 .* has 1\.\.2"):
        eager_maps(tiny_model("llama"), tiny_batch([5]), [3])
