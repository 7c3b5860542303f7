"""A teacher without weights has the sizes, the parameters and the refusals of the real one."""

import pytest
import torch

from pipeline.errors import IncompatibleError
from pipeline.teacher.capture.outline import (
    known_config,
    outline,
    outlined_report,
    weight_bytes,
    widest_inner,
)
from tests.captured import signal
from tests.tiny import tiny_config, tiny_model


def outlined(kind, task="causal-lm", dtype=torch.float32):
    return outline(known_config(tiny_config(kind).to_dict()), task=task, dtype=dtype)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_oss", "cohere"])
def test_an_outline_weighs_what_the_teacher_weighs_and_holds_nothing(kind):
    model = outlined(kind)
    assert weight_bytes(model) == weight_bytes(tiny_model(kind))
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}


def test_a_narrower_dtype_halves_the_weights():
    wide, narrow = outlined("llama"), outlined("llama", dtype=torch.bfloat16)
    assert sum(p.numel() * p.element_size() for p in narrow.parameters()) * 2 == sum(
        p.numel() * p.element_size() for p in wide.parameters()
    )


def test_packed_matrices_are_counted_in_their_bits():
    model = outlined("llama")
    matrices = sum(
        p.numel() for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2
    )
    assert weight_bytes(model) - weight_bytes(model, bits=8) == 3 * matrices
    assert weight_bytes(model, bits=8) - weight_bytes(model, bits=4) == matrices // 2


def test_the_random_state_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    outlined("llama")
    assert torch.equal(torch.rand(2), expected)


def test_attention_that_capture_refuses_is_refused_here_by_its_own_reason():
    with pytest.raises(IncompatibleError, match="uses a soft cap"):
        outlined_report(outlined("gemma2"), [signal("attention", 1, "qk")])
    with pytest.raises(IncompatibleError, match="hidden layer 9 asked for"):
        outlined_report(outlined("llama"), [signal("hidden", 9, "int8")])


def test_what_stops_a_pass_without_values_leaves_what_came_before(monkeypatch):
    model = outlined("llama")
    block = model.model.layers[1]

    def experts(*args, **kwargs):
        return torch.ones(1, device="meta").item()

    monkeypatch.setattr(block, "forward", experts)
    report = outlined_report(model, [signal("attention", 1, "qk"), signal("value", 1, "int8")])
    assert (report.heads, report.kv_heads, report.d_head, report.d_value) == (4, 2, 8, 8)


def test_a_feed_forward_layer_is_the_widest_axis_of_a_block():
    assert widest_inner(outlined("gpt2")) == 4 * 32


def test_a_family_that_transformers_does_not_have_is_refused():
    with pytest.raises(IncompatibleError, match="model_type is 'foreign'"):
        known_config({"model_type": "foreign"})
