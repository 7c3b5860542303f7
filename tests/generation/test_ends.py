"""A text ends where the tokenizer, the model or what it was taught on says so."""

import pytest
from tokenizers import AddedToken, Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pipeline.generation.generate import end_ids
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, 60)}}
    made = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<s>")),
        pad_token="<pad>",
        eos_token="</s>",
    )
    made.add_tokens([AddedToken("<|turn|>", special=True)])
    return made


def model_with(eos):
    model = tiny_model("llama", layers=1)
    assert model.generation_config is not None
    model.generation_config.eos_token_id = eos
    return model


@pytest.mark.parametrize(
    ("own", "want"), [(None, [2]), (2, [2]), (5, [2]), ([5, 60], [2, 60]), (60, [2, 60])]
)
def test_the_tokenizers_end_and_the_models_own_but_no_id_that_text_is_made_of(tokenizer, own, want):
    assert tokenizer.convert_tokens_to_ids("<|turn|>") == 60
    assert end_ids(model_with(own), tokenizer) == want


def test_the_mark_that_targets_end_with_ends_a_text(tokenizer):
    rows = [([7, 8, 60, 9], [False, True, True, False]), ([7, 8], [False, True]), ([7], [False])]
    assert end_ids(model_with(None), tokenizer, rows) == [2, 60]
    assert end_ids(model_with(None), tokenizer, rows[1:]) == [2]


def test_a_tokenizer_without_an_end_leaves_it_to_the_number_of_tokens():
    words = {"<pad>": 0, "a": 1}
    bare = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="a")), pad_token="<pad>"
    )
    assert end_ids(model_with(None), bare) == []
