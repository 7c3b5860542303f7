"""What a matrix reads is measured on live tokens alone, in any batch."""

import pytest
import torch

from pipeline.errors import IntegrityError
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.magnitudes import input_magnitudes
from tests.tiny import CAUSAL, tiny_batch, tiny_model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "distilbert"])
def test_padding_and_batches_change_nothing(kind):
    model = tiny_model(kind)
    batch = tiny_batch([7, 4, 2])
    together = input_magnitudes(model, [batch], is_causal=kind in CAUSAL)
    rows = [
        {name: value[i : i + 1, :length] for name, value in batch.items()}
        for i, length in enumerate((7, 4, 2))
    ]
    apart = input_magnitudes(model, rows, is_causal=kind in CAUSAL)
    assert together.keys() == apart.keys()
    for name, values in together.items():
        torch.testing.assert_close(values, apart[name])


def test_it_is_the_root_mean_square_of_the_input():
    model = tiny_model("llama")
    batch = tiny_batch([6, 6])
    seen = []
    down = model.model.layers[1].mlp.down_proj
    handle = down.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    found = input_magnitudes(model, [batch], is_causal=True)
    handle.remove()
    expected = seen[0].double().square().mean((0, 1)).sqrt().float()
    torch.testing.assert_close(found["model.layers.1.mlp.down_proj.weight"], expected)
    blocks = {find_anatomy(model).block_of(name) for name in found}
    assert blocks == {1, 2}


def test_what_is_not_finite_is_named():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 0] = torch.nan
    with pytest.raises(IntegrityError, match=r"layers\.0\.mlp\.down_proj.*not finite"):
        input_magnitudes(model, [tiny_batch([5])], is_causal=True)
