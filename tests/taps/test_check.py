from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, OPTConfig, OPTForCausalLM

from pipeline.errors import IncompatibleError
from pipeline.taps import check as check_module
from pipeline.taps import check_attention as check_attention_module
from pipeline.taps import tap as tap_module
from pipeline.taps.check import TapRequest, check_taps
from pipeline.taps.head import HeadSpec, apply_head, head_parameters
from pipeline.taps.tap import IMPLEMENTATION, tap
from tests.tiny import CAUSAL, tiny_batch, tiny_model


@pytest.mark.parametrize(
    "kind",
    [
        "llama", "qwen3", "gpt2", "gpt_neox", "mistral", "granite", "cohere",
        "bert", "roberta", "distilbert",
    ],
)  # fmt: skip
def test_proved_architectures_pass_with_all_layers(kind):
    model, batch = tiny_model(kind), tiny_batch([7, 5, 1])
    causal = kind in CAUSAL
    report = check_taps(
        model, batch, TapRequest(hidden=[0, 1, 2], attention=[1, 2], head=causal), max_length=8
    )
    rule = "causal" if causal else "full"
    assert report.rule == {1: rule, 2: rule}
    assert report.causal is causal
    assert (report.depth, report.d_teacher, report.heads, report.d_head) == (2, 32, 4, 8)
    assert report.kv_heads == (
        2 if kind in ("llama", "qwen3", "mistral", "granite", "cohere") else 4
    )
    assert sorted(report.scaling) == [1, 2]
    assert (report.head is not None) is causal
    assert model.config._attn_implementation == IMPLEMENTATION
    assert not model.training


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("gpt_oss", r"GptOssForCausalLM: .*attention sinks.*leave attention out"),
        ("gemma2", r"Gemma2ForCausalLM: .*soft cap.*leave attention out.*`form: map`"),
        (
            "mistral",
            r"MistralForCausalLM layer 1 .*window of 8 tokens, found a row of 12.*`form: map`",
        ),
        (
            "deberta_v2",
            r"DebertaV2ForSequenceClassification computes attention outside.*`form: map`",
        ),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_by_name(kind, reason):
    model = tiny_model(kind)
    original = model.config._attn_implementation
    with pytest.raises(IncompatibleError, match=reason) as caught:
        check_taps(model, tiny_batch([12, 5]), TapRequest(hidden=[1], attention=[1, 2]))
    assert "\n" not in str(caught.value)
    assert model.config._attn_implementation == original


@pytest.mark.parametrize("kind", ["gpt_oss", "gemma2", "mistral", "deberta_v2"])
def test_their_hidden_states_and_heads_are_still_served(kind):
    model = tiny_model(kind)
    original = model.config._attn_implementation
    head = kind in CAUSAL
    report = check_taps(
        model, tiny_batch([12, 5]), TapRequest(hidden=[0, 1, 2], head=head), max_length=12
    )
    assert report.rule == {}
    assert model.config._attn_implementation == original
    assert report.causal is head


@pytest.mark.parametrize(
    "kind", ["llama", "qwen3", "gpt2", "gpt_neox", "bert", "roberta", "distilbert"]
)
def test_query_and_key_follow_from_the_hidden_state_below(kind):
    model = tiny_model(kind)
    report = check_taps(model, tiny_batch([7, 5]), TapRequest(below=[1, 2]))
    assert sorted(report.scaling) == sorted(report.rule) == [1, 2]
    assert report.heads == 4


@pytest.mark.parametrize("wrong", ["bias", "another layer"])
def test_a_block_that_does_not_rebuild_is_named(wrong, monkeypatch):
    plain = check_module.query_key_parameters

    def changed(model, layer):
        found = plain(model, 1 if wrong == "another layer" else layer)
        if wrong == "bias":
            found = {n: v + 0.01 * n.endswith("q_proj.weight") for n, v in found.items()}
        return found

    monkeypatch.setattr(check_module, "query_key_parameters", changed)
    with pytest.raises(
        IncompatibleError, match=r"Llama.*: query of layer 2 rebuilt from hidden layer 1 differs by"
    ):
        check_taps(tiny_model("llama"), tiny_batch([7, 5]), TapRequest(below=[2]))


def test_a_block_that_does_not_run_alone_is_named(monkeypatch):
    def refuse(*args):
        raise RuntimeError("mat1 and mat2\nshapes")

    monkeypatch.setattr(check_module, "query_key_parameters", refuse)
    with pytest.raises(
        IncompatibleError, match=r"block 2 does not run by itself \(mat1 and mat2 shapes\).*form qk"
    ):
        check_taps(tiny_model("llama"), tiny_batch([7, 5]), TapRequest(below=[2]))


@pytest.mark.parametrize(
    ("kind", "rule"),
    [("llama", "causal"), ("gemma2", "causal"), ("mistral", "causal"), ("gpt2", "causal"),
     ("bert", "full"), ("deberta_v2", "full")],
)  # fmt: skip
def test_own_maps_are_served_where_query_and_key_say_less(kind, rule):
    model = tiny_model(kind)
    original = model.config._attn_implementation
    report = check_taps(
        model, tiny_batch([12, 5]), TapRequest(hidden=[1], maps=[1, 2]), max_length=20
    )
    assert report.rule == {1: rule, 2: rule}
    assert report.scaling == {}
    assert report.heads == 4
    assert report.causal is (rule == "causal")
    assert model.config._attn_implementation == original


def test_sinks_are_refused_as_maps_too():
    with pytest.raises(
        IncompatibleError, match=r"GptOss.*sum over the keys of attention layer 1 differs by"
    ):
        check_taps(tiny_model("gpt_oss"), tiny_batch([12, 5]), TapRequest(maps=[1]))


def test_maps_of_a_model_that_eager_attention_changes_are_refused(monkeypatch):
    plain = check_attention_module.eager_maps

    def changed(*args):
        maps, output = plain(*args)
        return maps, output * 1.01

    monkeypatch.setattr(check_attention_module, "eager_maps", changed)
    with pytest.raises(IncompatibleError, match=r"Llama.*output under eager attention differs by"):
        check_taps(tiny_model("llama"), tiny_batch([7, 5]), TapRequest(maps=[2]))


def test_values_are_of_one_shape_beside_query_and_key():
    report = check_taps(tiny_model("llama"), tiny_batch([7, 5]), TapRequest(values=[2]))
    assert (report.kv_heads, report.d_value, report.rule) == (2, 8, {2: "causal"})
    assert (
        check_taps(tiny_model("llama"), tiny_batch([7, 5]), TapRequest(attention=[2])).d_value == 0
    )


def test_a_window_longer_than_the_batch_is_seen_at_the_greatest_length():
    model, batch = tiny_model("mistral", sliding_window=16), tiny_batch([12, 5])
    assert check_taps(model, batch, TapRequest(attention=[1]), max_length=16).rule == {1: "causal"}
    with pytest.raises(IncompatibleError, match="window of 16 tokens, found a row of 20"):
        check_taps(model, batch, TapRequest(attention=[1]), max_length=20)


def test_a_window_nobody_announces_is_seen_in_the_mask(monkeypatch):
    model, batch = tiny_model("mistral", sliding_window=16), tiny_batch([12, 5])
    hear = tap_module._Listener.hear
    monkeypatch.setattr(
        tap_module._Listener, "hear", lambda self, *args: hear(self, *args[:-1], None)
    )
    with pytest.raises(IncompatibleError, match="layer 1 does not mask a row of 20 tokens by"):
        check_taps(model, batch, TapRequest(attention=[1]), max_length=20)
    with pytest.raises(IncompatibleError, match="attention of layer 1 differs by"):
        check_taps(model, tiny_batch([20, 4]), TapRequest(attention=[1]))


def test_sinks_that_hide_their_name_are_refused_by_value(monkeypatch):
    monkeypatch.setattr(tap_module, "SCORE_CHANGERS", {})
    model = tiny_model("gpt_oss")
    with pytest.raises(
        IncompatibleError, match=r"GptOssForCausalLM: .*differs by .* at most 0.0001"
    ):
        check_taps(model, tiny_batch([7, 5]), TapRequest(attention=[1]))


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_a_layer_that_rescales_its_scores_is_named(kind, monkeypatch):
    model = tiny_model(kind)
    hear = tap_module._Listener.hear

    def wrong(self, module, query, key, value, mask, scaling, window):
        scaling *= 1.01 if self.layer == 2 else 1
        hear(self, module, query, key, value, mask, scaling, window)

    monkeypatch.setattr(tap_module._Listener, "hear", wrong)
    with pytest.raises(
        IncompatibleError, match=r"attention of layer 2 differs by .*expected at most"
    ):
        check_taps(model, tiny_batch([7, 5]), TapRequest(attention=[1, 2]))


def test_a_wrong_hidden_state_is_named(monkeypatch):
    keep = tap_module._Recorder.keep
    monkeypatch.setattr(
        tap_module._Recorder, "keep", lambda self, layer, state: keep(self, layer, state * 1.001)
    )
    with pytest.raises(IncompatibleError, match=r"BertForSequenceClassification: hidden layer 0"):
        check_taps(tiny_model("bert"), tiny_batch([7, 5]), TapRequest(hidden=[0]))


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("llama", {}, HeadSpec(bias=False)),
        ("granite", {}, HeadSpec(bias=False, scale=1 / 3)),
        ("cohere", {}, HeadSpec(bias=False, scale=0.25)),
        ("gemma2", {}, HeadSpec(bias=False, softcap=5.0)),
    ],
)
def test_head_spec_rebuilds_the_logits(kind, options, expected):
    model, batch = tiny_model(kind, **options), tiny_batch([6, 4])
    report = check_taps(model, batch, TapRequest(head=True))
    assert report.head is not None
    assert report.head.scale == pytest.approx(expected.scale)
    assert (report.head.bias, report.head.softcap) == (expected.bias, expected.softcap)
    with torch.no_grad(), tap(model, head=True) as record:
        logits = model(**batch).logits
        weight, bias = head_parameters(model)
        rebuilt = apply_head(record.head_input, weight, bias, report.head)
    assert torch.allclose(rebuilt, logits, atol=1e-5)


def test_head_bias_is_found_and_a_secret_scale_refused():
    model = tiny_model("llama")
    model.lm_head.bias = nn.Parameter(torch.randn(64))
    report = check_taps(model, tiny_batch([6, 4]), TapRequest(head=True))
    assert report.head == HeadSpec(bias=True)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(IncompatibleError, match=r"logits rebuilt with HeadSpec.*keep its logits"):
        check_taps(model, tiny_batch([6, 4]), TapRequest(head=True))


def test_a_classifier_has_no_head_to_store():
    with pytest.raises(
        IncompatibleError, match="BertForSequenceClassification has no output embedding"
    ):
        check_taps(tiny_model("bert"), tiny_batch([6, 4]), TapRequest(head=True))


def test_a_decoder_may_classify():
    model = tiny_model("gpt2", task="classification", num_labels=3)
    report = check_taps(model, tiny_batch([6, 4]), TapRequest(hidden=[2], attention=[1]))
    assert report.causal


def test_a_causal_claim_is_verified(monkeypatch):
    model = tiny_model("llama")
    for block in model.model.layers:
        block.self_attn.is_causal = False  # SDPA then attends to everything when no mask is given
    assert not check_taps(model, tiny_batch([6, 4]), TapRequest(hidden=[1])).causal


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_half_precision_passes(kind, dtype):
    model = tiny_model(kind).to(dtype)
    report = check_taps(model, tiny_batch([7, 5]), TapRequest(hidden=[0, 1, 2], attention=[1, 2]))
    assert sorted(report.rule) == [1, 2]


def test_checking_twice_and_training_mode():
    model, batch = tiny_model("llama").train(), tiny_batch([7, 5])
    first = check_taps(model, batch, TapRequest(hidden=[1], attention=[1]))
    assert check_taps(model, batch, TapRequest(hidden=[1], attention=[1])) == first
    assert model.training


def test_left_padding_is_refused():
    batch = tiny_batch([5, 3])
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    with pytest.raises(ValueError, match="pad on the right"):
        check_taps(tiny_model("llama"), batch, TapRequest(hidden=[1]))


def test_layers_are_refused_before_anything_runs():
    model = tiny_model("llama")
    with pytest.raises(IncompatibleError, match=r"layer 3 asked for, LlamaForCausalLM has 0\.\.2"):
        check_taps(model, {"attention_mask": torch.ones(1, 2)}, TapRequest(hidden=[3]))


def test_rows_of_one_token_prove_nothing():
    with pytest.raises(ValueError, match="longer row"):
        check_taps(tiny_model("bert"), tiny_batch([1, 1]), TapRequest(attention=[1]))


@pytest.fixture
def stories260k():
    path = Path(__file__).parents[3] / "shared" / "models" / "stories260K"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return AutoModelForCausalLM.from_pretrained(path, local_files_only=True)


def test_a_trained_model_passes_whole(stories260k):
    depth = stories260k.config.num_hidden_layers
    batch = tiny_batch([40, 9, 2], vocab=stories260k.config.vocab_size)
    layers = range(1, depth + 1)
    report = check_taps(
        stories260k,
        batch,
        TapRequest(hidden=range(depth + 1), attention=layers, head=True),
        max_length=128,
    )
    assert report.causal
    assert set(report.rule.values()) == {"causal"}


def test_a_head_that_calls_the_blocks_past_the_base_model_is_tapped_all_the_same():
    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=64,
        hidden_size=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = OPTForCausalLM(config).eval()
    inputs = tiny_batch([7, 5, 1])
    report = check_taps(model, inputs, TapRequest(hidden=[0, 1, 2], attention=[1, 2], head=True))
    assert report.head is not None
    with torch.no_grad(), tap(model, hidden=[2], attention=[2], head=True) as record:
        model(**inputs)
    assert {*record.hidden, *record.query} == {2}
    assert record.head_input is not None
    assert record.head_input.shape[-1] == config.hidden_size
