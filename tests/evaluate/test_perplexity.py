"""Perplexity is what its definition says, whatever the batch, the padding and the chunk."""

import math

import datasets
import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from pipeline.errors import ConfigError, IntegrityError
from pipeline.evaluate.perplexity import perplexity

CPU = torch.device("cpu")
VOCAB = 13
ROWS = [[1, 5, 2], [3], [4, 4, 6, 7, 8, 9, 2], [10, 11], [2, 3, 4, 5, 6]]


def llama(seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


def split(rows, masks=None):
    masks = masks or [[True] * len(row) for row in rows]
    return datasets.Dataset.from_dict({"input_ids": rows, "loss_mask": masks})


def by_hand(model, rows, masks):
    nats = []
    with torch.inference_mode():
        for row, mask in zip(rows, masks, strict=True):
            log_p = model(input_ids=torch.tensor([row])).logits[0].double().log_softmax(-1)
            nats += [-log_p[t, row[t + 1]].item() for t in range(len(row) - 1) if mask[t + 1]]
    return nats


def test_a_uniform_model_is_as_unsure_as_its_vocabulary_is_large():
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    found = perplexity(model, split(ROWS), pad_id=0, batch_tokens=8, device=CPU)
    assert found.perplexity == pytest.approx(VOCAB, rel=1e-6)
    assert found.nats_per_token == pytest.approx(math.log(13), rel=1e-6)
    assert found.targets == 2 + 0 + 6 + 1 + 4


def test_it_is_the_mean_over_counted_targets():
    model = llama()
    masks = [[True, False, True], [True], [False] * 3 + [True] * 4, [True, False], [True] * 5]
    want = by_hand(model, ROWS, masks)
    found = perplexity(model, split(ROWS, masks), pad_id=0, batch_tokens=64, device=CPU)
    assert found.targets == len(want) == 1 + 0 + 4 + 0 + 4
    assert found.nats_per_token == pytest.approx(sum(want) / len(want), rel=1e-5)


def test_batch_size_padding_chunk_and_row_order_change_nothing():
    model = llama()
    want = perplexity(model, split(ROWS), pad_id=0, batch_tokens=1, device=CPU).nats_per_token
    for batch_tokens, pad_id, chunk in [(8, 0, 1), (64, 12, 3 * VOCAB), (1000, 5, 1 << 20)]:
        for rows in (ROWS, ROWS[::-1]):
            found = perplexity(
                model,
                split(rows),
                pad_id=pad_id,
                batch_tokens=batch_tokens,
                device=CPU,
                chunk_logits=chunk,
            )
            assert found.nats_per_token == pytest.approx(want, rel=1e-5)


def test_logits_are_never_wider_than_the_chunk():
    model = llama()
    seen = []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.numel()))
    perplexity(model, split(ROWS), pad_id=0, batch_tokens=64, device=CPU, chunk_logits=4 * VOCAB)
    probe, head, *chunks = seen
    assert probe == head == 7 * VOCAB
    assert max(chunks) == 4 * VOCAB


def test_a_soft_cap_after_the_head_is_not_forgotten():
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=VOCAB,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            final_logit_softcapping=0.5,
            initializer_range=0.5,
            attn_implementation="eager",
        )
    ).eval()
    masks = [[True] * len(row) for row in ROWS]
    want = by_hand(model, ROWS, masks)
    found = perplexity(model, split(ROWS), pad_id=0, batch_tokens=64, device=CPU)
    assert found.nats_per_token == pytest.approx(sum(want) / len(want), rel=1e-5)


def test_a_split_without_targets_is_refused():
    with pytest.raises(ConfigError, match="test: found 0 targets in 2 rows, expected at least 1"):
        perplexity(llama(), split([[1], [2]]), pad_id=0, batch_tokens=8, device=CPU, label="test")


def test_a_loss_that_is_not_finite_is_refused():
    model = llama()
    torch.nn.init.constant_(model.lm_head.weight, float("nan"))
    with pytest.raises(IntegrityError, match="row 0 has a loss of nan, expected a finite one"):
        perplexity(model, split(ROWS), pad_id=0, batch_tokens=8, device=CPU)
