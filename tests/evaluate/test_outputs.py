"""A sequence model's outputs are those of each row alone, whatever the batch."""

import datasets
import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.evaluate.answers import sequence_logits

CPU = torch.device("cpu")
ROWS = [[1, 5, 2], [3], [4, 4, 6, 7, 8, 9, 2], [10, 11], [2, 3, 4, 5, 6]]


def bert(outputs=2):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=13,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=16,
        num_labels=outputs,
        initializer_range=0.8,
        pad_token_id=0,
    )
    return BertForSequenceClassification(config).eval()


def split(rows):
    types = [[index % 2 for index in range(len(row))] for row in rows]
    return datasets.Dataset.from_dict({"input_ids": rows, "token_type_ids": types})


@pytest.mark.parametrize("batch_tokens", [1, 8, 1000])
def test_an_output_is_the_row_alone_whatever_the_batch(batch_tokens):
    model = bert(5)
    found = sequence_logits(
        model, split(ROWS), outputs=5, pad_id=0, batch_tokens=batch_tokens, device=CPU
    )
    with torch.inference_mode():
        for row, logits in zip(ROWS, found, strict=True):
            types = torch.tensor([[index % 2 for index in range(len(row))]])
            alone = model(input_ids=torch.tensor([row]), token_type_ids=types).logits[0]
            torch.testing.assert_close(logits, alone.double(), rtol=1e-5, atol=1e-5)


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
        sequence_logits(model, split([[1]]), outputs=2, pad_id=0, batch_tokens=8, device=CPU)


def test_another_number_of_outputs_is_refused():
    with pytest.raises(IncompatibleError, match="the model has 3 outputs, the corpus 2"):
        sequence_logits(bert(3), split([[1]]), outputs=2, pad_id=0, batch_tokens=8, device=CPU)


def test_an_output_that_is_not_finite_is_refused():
    model = bert()
    torch.nn.init.constant_(model.classifier.bias, float("nan"))
    with pytest.raises(IntegrityError, match=r"a logit of rows 0.* is not finite"):
        sequence_logits(model, split([[1]]), outputs=2, pad_id=0, batch_tokens=8, device=CPU)
