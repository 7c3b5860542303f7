"""One call measures all that the metrics file promises, for both tasks."""

import math

import numpy as np
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)

from pipeline.corpus.tokens import TokenColumns, TokenMeta, TokenSet, write_tokens
from pipeline.errors import IncompatibleError
from pipeline.evaluate.evaluate import evaluate_model
from pipeline.provenance import canonical_json

CPU = torch.device("cpu")
ROWS = [[1, 5, 2], [3, 4], [4, 4, 6, 7]]


def token_set(path, *, labels=None):
    ids = np.concatenate([np.array(row, np.int32) for row in ROWS])
    columns = TokenColumns(
        offsets=np.cumsum([0] + [len(row) for row in ROWS]),
        input_ids=ids,
        loss_mask=np.ones(len(ids), bool),
        source_row=np.arange(3),
        piece=np.zeros(3, np.int32),
        label=None if labels is None else np.array(labels),
    )
    each = dict.fromkeys(("train", "validation", "test"), 3)
    meta = TokenMeta(
        task="causal-lm" if labels is None else "classification",
        classes=() if labels is None else ("no", "yes"),
        vocab=11,
        max_length=6,
        pad_id=0,
        columns=(),
        rows=each,
        tokens=dict.fromkeys(each, 9),
        targets=dict.fromkeys(each, 6),
        text_bytes=dict.fromkeys(each, 20),
        overlong=dict.fromkeys(each, 0),
        dropped=dict.fromkeys(each, 0),
        digest="d",
        tokenizer_digest="t",
        corpus_digest="c",
    )
    write_tokens(path, dict.fromkeys(each, columns), meta)
    return TokenSet.load(path)


def llama(vocab=11):
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    return LlamaForCausalLM(config)


COST = {
    "parameters",
    "parameters_without_embeddings",
    "bytes_on_disk",
    "tokens_per_second",
    "latency_seconds",
    "timing",
}


def test_a_causal_model(tmp_path):
    model = llama()
    torch.nn.init.zeros_(model.lm_head.weight)
    model.save_pretrained(tmp_path / "model")
    metrics = evaluate_model(
        model,
        token_set(tmp_path / "tokens"),
        batch_tokens=8,
        device=CPU,
        directory=tmp_path / "model",
        timing_repeats=1,
    )
    want = {f"{s}_{m}" for s in ("validation", "test") for m in ("perplexity", "nats_per_token")}
    assert set(metrics) == {"task"} | want | COST
    assert metrics["test_perplexity"] == pytest.approx(11)
    assert metrics["validation_nats_per_token"] == pytest.approx(math.log(11))
    assert metrics["timing"]["length"] == 6
    assert not model.training
    canonical_json(metrics)  # nothing that JSON cannot say


def test_a_classifier_that_always_says_yes(tmp_path):
    config = BertConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        pad_token_id=0,
    )
    model = BertForSequenceClassification(config)
    torch.nn.init.zeros_(model.classifier.weight)
    model.classifier.bias.data = torch.tensor([0.0, 1.0])
    metrics = evaluate_model(
        model,
        token_set(tmp_path, labels=[1, 1, 0]),
        batch_tokens=8,
        splits=("test",),
        device=CPU,
        timing_repeats=1,
    )
    want = {"test_accuracy", "test_f1", "test_matthews"}
    assert set(metrics) == {"task"} | want | COST - {"bytes_on_disk"}
    assert metrics["test_accuracy"] == pytest.approx(2 / 3)
    assert metrics["test_f1"] == pytest.approx(4 / 5)
    assert metrics["test_matthews"] == 0


def test_a_vocabulary_smaller_than_the_tokens_is_refused(tmp_path):
    with pytest.raises(IncompatibleError, match="found a vocabulary of 10, expected at least"):
        evaluate_model(llama(10), token_set(tmp_path), batch_tokens=8, device=CPU)
