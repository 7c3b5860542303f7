"""Classifiers are scored as written-out confusion matrices say, whatever the batch."""

import datasets
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from pipeline.errors import ConfigError, IncompatibleError
from pipeline.evaluate.classification import classification_scores, classify

CPU = torch.device("cpu")
ROWS = [[1, 5, 2], [3], [4, 4, 6, 7, 8, 9, 2], [10, 11], [2, 3, 4, 5, 6]]


def bert(classes=2, **changes):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        num_labels=classes,
        initializer_range=0.8,
        pad_token_id=0,
        **changes,
    )
    return BertForSequenceClassification(config).eval()


def split(rows, labels):
    types = [[index % 2 for index in range(len(row))] for row in rows]
    return datasets.Dataset.from_dict({"input_ids": rows, "token_type_ids": types, "label": labels})


def test_binary_scores_from_a_written_out_table():
    # true positives 2, false positives 1, false negatives 1, true negatives 4
    labels = [1, 1, 1, 0, 0, 0, 0, 0]
    predicted = [1, 1, 0, 1, 0, 0, 0, 0]
    scores = classification_scores(labels, predicted, 2)
    assert scores.accuracy == 6 / 8
    assert scores.f1 == pytest.approx(2 * 2 / (2 * 2 + 1 + 1))
    assert scores.matthews == pytest.approx((2 * 4 - 1 * 1) / (3 * 3 * 5 * 5) ** 0.5)
    assert scores.rows == 8


def test_with_three_classes_f1_is_the_plain_mean_and_an_absent_class_counts_zero():
    scores = classification_scores([0, 0, 1, 1], [0, 0, 1, 0], 3)
    assert scores.f1 == pytest.approx((4 / 5 + 2 / 3 + 0) / 3)


def test_one_class_only_scores_zero_without_a_warning():
    scores = classification_scores([0, 1], [0, 0], 2)
    assert (scores.accuracy, scores.f1, scores.matthews) == (0.5, 0.0, 0.0)


@pytest.mark.parametrize("batch_tokens", [1, 8, 1000])
def test_the_class_is_the_row_alone_whatever_the_batch(batch_tokens):
    model = bert(5)
    alone = []
    with torch.inference_mode():
        for row in ROWS:
            types = torch.tensor([[index % 2 for index in range(len(row))]])
            logits = model(input_ids=torch.tensor([row]), token_type_ids=types).logits
            alone.append(int(logits.argmax()))
    assert len(set(alone)) > 1
    scores = classify(
        model, split(ROWS, alone), classes=5, pad_id=0, batch_tokens=batch_tokens, device=CPU
    )
    assert scores.accuracy == 1.0


def test_a_decoder_with_another_padding_id_is_refused():
    config = LlamaConfig(
        vocab_size=13,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=3,
    )
    model = LlamaForSequenceClassification(config).eval()
    with pytest.raises(IncompatibleError, match="the model pads with id 3, the tokens with 0"):
        classify(model, split([[1]], [0]), classes=2, pad_id=0, batch_tokens=8, device=CPU)


def test_another_number_of_classes_is_refused():
    with pytest.raises(IncompatibleError, match="the model has 3 classes, the corpus 2"):
        classify(bert(3), split([[1]], [0]), classes=2, pad_id=0, batch_tokens=8, device=CPU)


def test_a_label_outside_the_classes_is_refused():
    with pytest.raises(ConfigError, match="found label 2, expected 0 to 1"):
        classify(bert(), split([[1]], [2]), classes=2, pad_id=0, batch_tokens=8, device=CPU)
