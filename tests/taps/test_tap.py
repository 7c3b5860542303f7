import threading

import pytest
import torch

from pipeline.errors import IncompatibleError
from pipeline.taps import tap as tap_module
from pipeline.taps.inputs import model_inputs, run_base
from pipeline.taps.scores import attention_log_probs, visible_keys
from pipeline.taps.tap import IMPLEMENTATION, prepare_attention, tap
from tests.tiny import CAUSAL, tiny_batch, tiny_model

KINDS = ["llama", "qwen3", "gpt2", "bert", "distilbert"]
MORE = ["mistral", "gpt_neox", "roberta", "granite", "cohere"]
PROJECTIONS = {
    "llama": "model.layers.1.self_attn.o_proj",
    "qwen3": "model.layers.1.self_attn.o_proj",
    "gpt2": "transformer.h.1.attn.c_proj",
    "bert": "bert.encoder.layer.1.attention.output.dense",
    "distilbert": "distilbert.transformer.layer.1.attention.out_lin",
}
"""What reads the attention function's output in layer 2."""


def rebuilt(record, layer, mask, kind):
    rule = "causal" if kind in CAUSAL else "full"
    visible = visible_keys(mask.sum(1), mask.shape[1], rule)
    return attention_log_probs(
        record.query[layer], record.key[layer], record.scaling[layer], visible
    ).exp()


@pytest.mark.parametrize("kind", KINDS + MORE)
def test_attention_equals_eager_maps_and_logits_stay(kind):
    model, batch = tiny_model(kind, layers=3), tiny_batch([7, 5, 1])
    live = batch["attention_mask"].bool()
    with torch.no_grad():
        before = model(**batch).logits
        with tap(model, attention=[1, 3]) as record:
            logits = model(**batch).logits
        model.set_attn_implementation("eager")
        maps = model(**batch, output_attentions=True).attentions
    assert sorted(record.query) == sorted(record.key) == sorted(record.scaling) == [1, 3]
    for layer in (1, 3):
        found = rebuilt(record, layer, batch["attention_mask"], kind)
        difference = (found - maps[layer - 1]).transpose(1, 2)[live].abs().max()
        assert difference < 1e-5
        assert maps[layer - 1].transpose(1, 2)[live].max(-1).values.mean() > 0.3  # not uniform
    assert torch.allclose(logits, before, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_hidden_states_follow_the_convention(kind):
    model, batch = tiny_model(kind, layers=3), tiny_batch([7, 5, 3])
    with torch.no_grad(), tap(model, hidden=range(4), head=True) as record:
        output = model(**batch, output_hidden_states=True)
    assert sorted(record.hidden) == [0, 1, 2, 3]
    for layer in range(3):
        assert torch.equal(record.hidden[layer], output.hidden_states[layer])
    last = record.hidden[3]
    if kind in CAUSAL:  # theirs stands after the final norm, ours before it
        norm = model.transformer.ln_f if kind == "gpt2" else model.model.norm
        assert not torch.allclose(last, output.hidden_states[3], atol=1e-2)
        with torch.no_grad():
            last = norm(last)
            head = model.lm_head(record.head_input)
        assert torch.equal(head, output.logits)
    assert torch.equal(last, output.hidden_states[3])
    assert torch.equal(record.head_input, output.hidden_states[3])


@pytest.mark.parametrize("kind", KINDS)
def test_batch_composition_changes_nothing(kind):
    model, batch = tiny_model(kind), tiny_batch([9, 4, 6])
    causal = kind in CAUSAL
    with torch.inference_mode(), tap(model, hidden=[0, 1, 2], attention=[1, 2]) as record:
        run_base(model, model_inputs(batch, is_causal=causal))
        together = record.hidden, record.query, record.key
        for row, length in enumerate([9, 4, 6]):
            alone = {name: value[row : row + 1, :length] for name, value in batch.items()}
            run_base(model, model_inputs(alone, is_causal=causal))
            for layer in (0, 1, 2):
                ours = together[0][layer][row, :length]
                assert torch.allclose(ours, record.hidden[layer][0], atol=1e-5)
            for layer in (1, 2):
                query, key = together[1][layer], together[2][layer]
                assert torch.allclose(query[row, :, :length], record.query[layer][0], atol=1e-5)
                assert torch.allclose(key[row, :, :length], record.key[layer][0], atol=1e-5)


def test_key_comes_before_head_repetition():
    model, batch = tiny_model("llama", heads=4, kv_heads=2), tiny_batch([5])
    with torch.no_grad(), tap(model, attention=[2]) as record:
        model(**batch)
    assert record.query[2].shape == (1, 4, 5, 8)
    assert record.key[2].shape == (1, 2, 5, 8)
    assert record.scaling[2] == pytest.approx(8**-0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_what_attention_takes_the_mean_of(kind):
    """softmax(QKᵀ)V, heads joined, is what the output projection of the layer reads."""
    model, batch = tiny_model(kind, layers=3), tiny_batch([7, 5, 1])
    live = batch["attention_mask"].bool()
    projection = model.get_submodule(PROJECTIONS[kind])
    read = []
    handle = projection.register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad(), tap(model, attention=[2], values=[2, 3]) as record:
        model(**batch)
    handle.remove()
    assert sorted(record.value) == [2, 3]
    assert sorted(record.query) == [2]
    assert record.value[2].shape == record.key[2].shape
    maps = rebuilt(record, 2, batch["attention_mask"], kind)
    value = record.value[2].repeat_interleave(maps.shape[1] // record.value[2].shape[1], dim=1)
    mean = (maps @ value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(mean[live], read[0][live], rtol=0, atol=1e-5)


def test_gradients_flow_through_values():
    model, batch = tiny_model("llama"), tiny_batch([5, 3])
    with tap(model, values=[2]) as record:
        model(**batch)
    record.value[2].square().sum().backward()
    assert model.model.layers[1].self_attn.v_proj.weight.grad.any()
    assert not record.query


def test_scaling_of_each_layer_is_kept():
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    with torch.no_grad(), tap(model, attention=[1, 2]) as record:
        model(**tiny_batch([4]))
    assert record.scaling[2] == pytest.approx(record.scaling[1] / 2)


def test_only_asked_layers_are_kept_and_a_pass_replaces_the_last():
    model = tiny_model("llama", layers=3)
    with torch.no_grad(), tap(model, hidden=[2], attention=[1]) as record:
        model(**tiny_batch([5]))
        first = record.hidden[2]
        model(**tiny_batch([6, 2]))
    assert list(record.hidden) == [2]
    assert list(record.query) == [1]
    assert record.head_input is None
    assert first.shape == (1, 5, 32)
    assert record.hidden[2].shape == (2, 6, 32)


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_nothing_stays_behind_also_after_errors():
    model, batch = tiny_model("llama"), tiny_batch([4])
    before, listeners = hooks_of(model), len(tap_module._LISTENERS)
    with torch.no_grad(), tap(model, hidden=[0, 1, 2], attention=[1, 2], head=True):
        assert len(tap_module._LISTENERS) > listeners
        model(**batch)
    assert (hooks_of(model), len(tap_module._LISTENERS)) == (before, listeners)
    with (
        pytest.raises(IndexError),
        torch.no_grad(),
        tap(model, hidden=[0, 1, 2], attention=[1, 2], head=True),
    ):
        model(input_ids=torch.tensor([[9999]]))
    assert (hooks_of(model), len(tap_module._LISTENERS)) == (before, listeners)
    with (
        pytest.raises(RuntimeError, match="tapped already"),
        tap(model, attention=[1]),
        tap(model, attention=[1, 2]),
    ):
        pass
    assert (hooks_of(model), len(tap_module._LISTENERS)) == (before, listeners)


def test_run_base_records_the_head_input_without_logits():
    model, batch = tiny_model("llama"), tiny_batch([5, 3])
    with torch.no_grad(), tap(model, head=True) as record:
        output = run_base(model, model_inputs(batch, is_causal=True))
        assert record.head_input is output
        logits = model(**batch).logits
    live = batch["attention_mask"].bool()
    assert torch.allclose(model.lm_head(output)[live], logits[live], atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gpt2", "gpt_neox"])
def test_causal_models_need_no_mask(kind):
    model, batch = tiny_model(kind), tiny_batch([8, 3, 5])
    live = batch["attention_mask"].bool()
    inputs = model_inputs(batch, is_causal=True)
    assert set(inputs) == {"input_ids", "use_cache"}
    with torch.no_grad():
        assert torch.allclose(model(**inputs).logits[live], model(**batch).logits[live], atol=1e-5)
    assert set(model_inputs(batch, is_causal=False)) == set(batch)


def distillation_gradients(kind, checkpointing, inside):
    """Gradients of a loss on every kind of recorded tensor; backward inside the tap or after."""
    model, batch = tiny_model(kind), tiny_batch([6, 4])
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    for name in ("attention_dropout", "attention_probs_dropout_prob", "attn_pdrop"):
        if hasattr(model.config, name):
            setattr(model.config, name, 0.0)
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    inputs = model_inputs(batch, is_causal=kind in CAUSAL)
    calls = []
    with tap(
        model, hidden=[0, 1, 2], attention=[1, 2], head=True, watch=lambda *call: calls.append(call)
    ) as record:
        run_base(model, inputs)
        loss = record.head_input.square().mean()
        for layer in (1, 2):
            loss = loss + rebuilt(record, layer, batch["attention_mask"], kind).square().mean()
        for layer in (0, 1, 2):
            loss = loss + record.hidden[layer].square().mean()
        kept = dict(record.query)
        if inside:
            loss.backward()
            assert all(record.query[layer] is kept[layer] for layer in kept)
    if not inside:
        loss.backward()
    assert [layer for layer, _ in calls] == [1, 2]
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "distilbert"])
def test_checkpointing_records_once_and_cuts_no_gradient(kind, monkeypatch):
    runs = []
    sdpa = tap_module.sdpa_attention_forward

    def counted(*args, **kwargs):
        runs.append(1)
        return sdpa(*args, **kwargs)

    monkeypatch.setattr(tap_module, "sdpa_attention_forward", counted)
    loss, gradients = distillation_gradients(kind, checkpointing=False, inside=True)
    assert len(runs) == 2
    for inside in (True, False):
        runs.clear()
        again, checkpointed = distillation_gradients(kind, checkpointing=True, inside=inside)
        assert len(runs) == 4  # two layers, and both once more in the backward pass
        assert again == pytest.approx(loss, rel=1e-6)
        for name, gradient in gradients.items():
            if gradient is None:
                assert checkpointed[name] is None
            else:
                assert torch.allclose(gradient, checkpointed[name], atol=1e-6), name
    reached = [name for name, gradient in gradients.items() if gradient is not None]
    assert any(part in name for name in reached for part in ("q_proj", "c_attn", "query", "q_lin"))


def test_reentrant_checkpointing_is_refused():
    model = tiny_model("llama").train()
    model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": True})
    model.enable_input_require_grads()
    with (
        tap(model, attention=[1]),
        pytest.raises(IncompatibleError, match=r"LlamaForCausalLM layer 1 .*use_reentrant"),
    ):
        model(**model_inputs(tiny_batch([4]), is_causal=True))


def test_models_in_two_threads_do_not_mix():
    models = [tiny_model("llama", seed=seed) for seed in (1, 2)]
    batches = [tiny_batch([5, 3], seed=1), tiny_batch([8], seed=2)]
    found: list[object] = [None, None]
    barrier = threading.Barrier(2)

    def work(index):
        with torch.no_grad(), tap(models[index], hidden=[1], attention=[2]) as record:
            barrier.wait()
            for _ in range(5):
                models[index](**batches[index])
            found[index] = record

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for model, batch, record in zip(models, batches, found, strict=True):
        with torch.no_grad(), tap(model, hidden=[1], attention=[2]) as alone:
            model(**batch)
        assert torch.equal(record.hidden[1], alone.hidden[1])
        assert torch.equal(record.query[2], alone.query[2])


def test_a_hidden_state_changed_in_place_is_refused():
    model = tiny_model("llama", layers=2)

    def spoil(module, args):
        args[0].add_(1.0)

    model.model.layers[1].register_forward_pre_hook(spoil)
    with (
        torch.no_grad(),
        tap(model, hidden=[1]),
        pytest.raises(IncompatibleError, match="changes hidden layer 1 in place"),
    ):
        model(**tiny_batch([4]))


def test_our_name_is_not_saved_with_the_model(tmp_path):
    model = tiny_model("llama")
    prepare_attention(model)
    prepare_attention(model)
    assert model.config._attn_implementation == IMPLEMENTATION
    model.save_pretrained(tmp_path)
    assert IMPLEMENTATION not in (tmp_path / "config.json").read_text()


def test_prepared_models_still_generate():
    model, batch = tiny_model("llama"), tiny_batch([5])
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = model.generate(**batch, **options)
    prepare_attention(model)
    assert torch.equal(model.generate(**batch, **options), expected)


def test_layers_outside_the_interface_are_named(monkeypatch):
    model = tiny_model("gpt2")
    for block in model.transformer.h:
        monkeypatch.setattr(block.attn, "forward", lambda states, *args, **kwargs: (states, None))
    with (
        torch.no_grad(),
        tap(model, attention=[1, 2]),
        pytest.raises(IncompatibleError, match=r"GPT2LMHeadModel: layers \[1, 2\]"),
    ):
        model(**tiny_batch([4]))
