"""Parameters and bytes are what one counts by hand; speed states how it was measured."""

import time

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from pipeline.errors import ConfigError
from pipeline.evaluate.cost import bytes_on_disk, cost_metrics, count_parameters, measure_speed

CPU = torch.device("cpu")


def llama(*, tied):
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


# A block: queries and outputs 8x8, keys and values 8x4, three 8x16 of the MLP, two norms of 8.
BLOCKS = 2 * (2 * 64 + 2 * 32 + 3 * 128 + 2 * 8) + 8


@pytest.mark.parametrize(("tied", "tables"), [(True, 1), (False, 2)])
def test_parameters_of_a_llama_by_hand(tied, tables):
    assert count_parameters(llama(tied=tied)) == (BLOCKS + tables * 88, BLOCKS)


def test_every_lookup_table_is_an_embedding_and_a_classifier_is_not():
    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=11,
            hidden_size=8,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=5,
            type_vocab_size=2,
        )
    )
    total, without = count_parameters(model)
    assert total - without == (11 + 5 + 2) * 8
    assert total == sum(parameter.numel() for parameter in model.parameters())


def test_bytes_leave_out_hidden_files_and_second_formats(tmp_path):
    for name, size in {
        "model.safetensors": 100,
        "config.json": 20,
        "pytorch_model.bin": 1000,
        ".gitattributes": 7,
    }.items():
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "config.json")
    assert bytes_on_disk(tmp_path) == 140
    (tmp_path / "model.safetensors").unlink()
    assert bytes_on_disk(tmp_path) == 1040


def test_bytes_of_no_directory_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such directory; expected a Hugging Face model"):
        bytes_on_disk(tmp_path / "absent")


def test_speed_states_what_it_was_measured_with():
    model = llama(tied=True)
    timing = measure_speed(model, device=CPU, batch=3, length=5, repeats=2, warmup=1)
    assert (timing.batch, timing.length, timing.repeats, timing.device) == (3, 5, 2, "cpu")
    assert timing.threads == torch.get_num_threads()
    assert 0 < timing.slowest <= timing.tokens_per_second <= timing.fastest
    assert timing.latency_seconds > 0
    metrics = cost_metrics(model, directory=None, timing=timing)
    assert metrics["timing"] == {
        "batch": 3,
        "length": 5,
        "repeats": 2,
        "slowest": timing.slowest,
        "fastest": timing.fastest,
        "threads": timing.threads,
        "device": "cpu",
    }
    assert "bytes_on_disk" not in metrics


def test_a_timing_of_nothing_is_refused():
    with pytest.raises(ConfigError, match="repeats: found 0, expected at least 1"):
        measure_speed(llama(tied=True), device=CPU, repeats=0)


def test_a_model_that_is_slow_gets_one_pass_and_no_more(monkeypatch):
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    timing = measure_speed(llama(tied=True), device=CPU, batch=3, length=5, seconds=10.0)
    # Two passes of seven seconds each, both of the warm-up, of which the last counts.
    assert (timing.repeats, timing.latency_seconds) == (1, 7.0)
    assert timing.slowest == timing.fastest == timing.tokens_per_second == 15 / 7


def test_without_a_timing_there_is_no_speed():
    metrics = cost_metrics(llama(tied=True), directory=None, timing=None)
    assert set(metrics) == {"parameters", "parameters_without_embeddings"}
