import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus.tokens.spans import ends_of, sizes_of
from pipeline.corpus.tokens.tokenizer import load_tokenizer, train_tokenizer

TEXTS = st.text(st.sampled_from("ab \n\t.é漢🙂\u2028"), max_size=30)
BYTES = train_tokenizer(["ab ab. ab é 漢字 🙂🙂"] * 3, vocab=270)


def sizes(tokenizer, text):
    encoded = tokenizer(text, return_offsets_mapping=True)
    offsets = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2)
    return sizes_of(text, ends_of(offsets, len(text)))


def check(tokenizer, text):
    in_bytes, words = sizes(tokenizer, text)
    assert (in_bytes >= 0).all()
    assert (words >= 0).all()
    assert (in_bytes.sum(), words.sum()) == (len(text.encode()), len(text.split()))


@given(TEXTS.filter(bool))
def test_every_byte_and_word_belongs_to_one_token(text):
    check(BYTES, text)


@pytest.mark.parametrize("name", ["tokenizer-bert-base-uncased", "tokenizer-gpt2", "stories260K"])
def test_so_it_is_for_published_tokenizers(real_models, name):
    tokenizer = load_tokenizer(real_models / name)
    for text in ("Ünïcode  words,\nand 漢字 🙂!", " leading and trailing ", "x", "don't  stop"):
        check(tokenizer, text)


def test_a_character_in_several_tokens_counts_with_the_first_and_marks_are_empty():
    in_bytes, words = sizes(BYTES, "漢")
    assert in_bytes.tolist()[0] == in_bytes.tolist()[-1] == 0
    assert sorted(in_bytes.tolist())[-1] == 3
    assert words.sum() == 1


def test_what_stands_between_two_tokens_belongs_to_the_second():
    offsets = np.array([[0, 0], [1, 3], [4, 6], [0, 0]])
    assert ends_of(offsets, 8).tolist() == [0, 3, 8, 8]
    assert ends_of(np.zeros((2, 2), np.int64), 3).tolist() == [0, 0]
    assert ends_of(np.zeros((0, 2), np.int64), 0).tolist() == []
