"""Adapters train in place of a student's weights, and the export is the plain model again."""

import builtins
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GptOssConfig,
    MixtralConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
)

from pipeline.errors import ConfigError
from pipeline.student.model.build import build_student
from pipeline.student.model.lora import add_adapters, merge_adapters
from pipeline.student.model.origin import LoraOptions, StudentModel
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.tap import tap
from tests.tiny import Kind, tiny_batch, tiny_model

KINDS: tuple[Kind, ...] = ("llama", "qwen3", "gpt2", "bert", "distilbert")
OPTIONS = LoraOptions(r=2, alpha=4)


def logits(model: PreTrainedModel) -> Tensor:
    return model.eval()(**tiny_batch([6, 4])).logits


def trained(model: PreTrainedModel) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


def shaken(model: PreTrainedModel) -> None:
    """Move every trained parameter, as an optimiser would."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for value in model.parameters():
            if value.requires_grad:
                value += 0.1 * torch.randn(value.shape, generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_change_nothing_yet_and_merge_into_plain_weights(kind):
    model = tiny_model(kind)
    names, before = set(model.state_dict()), logits(model)
    add_adapters(model, OPTIONS)
    assert type(model) is type(tiny_model(kind))
    torch.testing.assert_close(logits(model), before)
    assert trained(model)
    assert all("lora_" in name for name in trained(model))
    shaken(model)
    moved = logits(model)
    assert (moved - before).abs().max() > 1e-2
    merge_adapters(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(logits(model), moved, rtol=1e-5, atol=1e-5)
    assert all(value.requires_grad for value in model.parameters())


SIZES = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
MIXTURES: dict[str, Any] = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8
    ),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
}


def mixture(kind: str) -> PreTrainedModel:
    """A mixture of experts in small; its matrices are large enough for each to matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(MIXTURES[kind])
    with torch.no_grad():
        for value in model.parameters():
            value.normal_(std=0.3) if value.ndim > 1 else None
    return model


@pytest.mark.parametrize("kind", MIXTURES)
def test_experts_and_routers_are_adapted_and_merged(kind, tmp_path):
    model = mixture(kind)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    said = logits(model)
    add_adapters(model, OPTIONS)
    torch.testing.assert_close(logits(model), said)
    shaken(model)
    loss = logits(model).square().mean()
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    moved = logits(model)
    merge_adapters(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    matrices = {name for name, value in before.items() if value.ndim > 1 and "bias" not in name}
    assert same & matrices == {"model.embed_tokens.weight", "lm_head.weight"}
    torch.testing.assert_close(logits(model), moved, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again), logits(model), rtol=1e-5, atol=1e-5)


def test_a_linear_module_of_a_familys_own_is_adapted_once():
    config = FalconConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=4, vocab_size=64)
    model = AutoModelForCausalLM.from_config(config)
    add_adapters(model, OPTIONS)
    block = "transformer.h.0."
    parts = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h")
    names = {name.partition(".lora_")[0] for name in trained(model)}
    assert names == {block + part for part in (*parts, "mlp.dense_4h_to_h")}


def test_only_the_experts_that_are_named(caplog):
    caplog.set_level("INFO")
    model = mixture("mixtral")
    add_adapters(model, LoraOptions(r=2, target_modules=["q_proj", "down_proj"]))
    names = {name.partition(".lora_")[0] for name in trained(model)}
    assert names == {
        f"model.layers.{n}.{part}" for n in range(2) for part in ("self_attn.q_proj", "mlp.experts")
    }
    assert "model.layers.*.mlp.experts.gate_up_proj (" in caplog.text
    assert "down_proj" not in caplog.text
    model = mixture("mixtral")
    add_adapters(model, LoraOptions(r=2, target_modules=["experts.down_proj"]))
    assert {name.split(".")[4] for name in trained(model)} == {"experts"}


def test_what_gets_no_adapter_is_named_with_its_share(caplog):
    caplog.set_level("INFO")
    add_adapters(tiny_model("llama"), OPTIONS)
    (line,) = [one for one in caplog.messages if one.startswith("without an adapter")]
    assert re.fullmatch(
        r"without an adapter, of all weights: lm_head.weight \([\d.]+%\), "
        r"model.embed_tokens.weight \([\d.]+%\)", line
    )  # fmt: skip
    caplog.clear()
    model = mixture("mixtral")
    add_adapters(model, LoraOptions(r=2, dropout=0.1))
    assert "experts.gate_up_proj (" in caplog.text
    assert not [name for name in trained(model) if "experts" in name]


def test_a_model_without_adapters_stays_as_it_is():
    model = tiny_model("llama").requires_grad_(False)
    merge_adapters(model)
    assert not trained(model)


def test_every_matrix_below_the_head_is_adapted_or_those_named():
    model = tiny_model("llama")
    add_adapters(model, OPTIONS)
    adapted = {name.partition(".lora_")[0] for name in trained(model)}
    expected = {
        f"model.layers.{block}.{part}"
        for block in range(2)
        for part in (
            *(f"self_attn.{p}_proj" for p in "qkvo"),
            *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
        )
    }
    assert adapted == expected
    model = tiny_model("llama")
    add_adapters(model, LoraOptions(r=2, target_modules=["q_proj", "v_proj"]))
    assert {name.split(".")[4] for name in trained(model)} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("kind", KINDS)
def test_taps_hear_an_adapted_student_and_gradients_reach_only_adapters(kind):
    model = tiny_model(kind, attn_implementation="sdpa")
    add_adapters(model, OPTIONS)
    shaken(model)
    anatomy = find_anatomy(model)
    assert anatomy.depth == 2
    with tap(model, hidden=[0, 1, 2], attention=[1, 2]) as record:
        model(**tiny_batch([6, 4]))
    total = record.hidden[2].sum() + record.query[2].square().sum() + record.key[1].square().sum()
    total.backward()
    reached = {name for name, value in model.named_parameters() if value.grad is not None}
    assert reached
    assert reached <= trained(model)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_head_that_the_checkpoint_lacks_is_trained_whole(kind, tmp_path):
    """A classifier from a checkpoint of the base model: its head is new, all else adapted."""
    tiny_model(kind, task="classification").base_model.save_pretrained(tmp_path)
    student = build_student(
        StudentModel(checkpoint=str(tmp_path), lora=OPTIONS),
        teacher_config=tiny_model(kind).config.to_dict(),
        vocab=64,
        classes=("a", "b", "c"),
        task="classification",
        seed=0,
    )
    head = "score" if kind == "llama" else "classifier"
    whole = {name for name in trained(student) if "lora_" not in name}
    assert whole
    assert all(name.startswith(head) for name in whole)
    shaken(student)
    moved = logits(student)
    merge_adapters(student)
    torch.testing.assert_close(logits(student), moved, rtol=1e-5, atol=1e-5)


def test_the_seed_decides_the_adapters(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)

    def built(seed: int) -> dict[str, Tensor]:
        config = tiny_model("llama").config.to_dict()
        model = build_student(
            StudentModel(checkpoint=str(tmp_path), lora=OPTIONS), teacher_config=config,
            vocab=64, task="causal-lm", seed=seed, classes=(),
        )  # fmt: skip
        return model.state_dict()

    state = torch.get_rng_state()
    one, same, other = built(1), built(1), built(2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("names", [["no_such"], ["lm_head"]])
def test_names_that_no_module_has_are_one_line(names):
    with pytest.raises(ConfigError, match=r"target_modules: no adapter comes of") as caught:
        add_adapters(tiny_model("llama"), LoraOptions(target_modules=names))
    assert "\n" not in str(caught.value)


def test_without_peft_the_extra_is_named(monkeypatch):
    plain = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "peft":
            raise ImportError(name)
        return plain(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ConfigError, match=r"pip install 'decant-kd\[lora\]'"):
        add_adapters(tiny_model("llama"), OPTIONS)
