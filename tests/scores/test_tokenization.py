"""Words of any script, and tokenizers of BLEU that work without a network."""

import importlib.util

import pytest

from pipeline.errors import ConfigError
from pipeline.scores.tokenization import (
    OFFLINE,
    UnicodeWords,
    bleu_tokenizer,
    check_tokenizer,
    is_english_script,
)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Две птицы, 2 гнезда!", ["две", "птицы", "2", "гнезда"]),
        ("鸟在唱歌。OK", ["鸟", "在", "唱", "歌", "ok"]),
        ("पेड़ पर", ["पेड़", "पर"]),
        ("ต้นไม้", ["ต้", "น", "ไ", "ม้"]),
        ("", []),
        ("\u0301 a_b", ["\u0301", "a", "b"]),
    ],
)
def test_words_are_runs_of_letters_and_their_marks(text, words):
    assert UnicodeWords().tokenize(text) == words


def test_a_few_foreign_names_leave_english_english():
    assert is_english_script(["the cat " * 100, "José"])
    assert not is_english_script(["für die Übung"])
    assert bleu_tokenizer(["Beijing (北京) is a city in China"]) == "13a"
    assert bleu_tokenizer([]) == "13a"


@pytest.mark.parametrize("name", ["auto", *OFFLINE])
def test_tokenizers_that_need_nothing_are_taken(name):
    assert check_tokenizer(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flores200", "flores200 needs the package sentencepiece and downloads a model"),
        ("mecab", "found 'mecab', expected auto or one of 13a, intl"),
    ],
)
def test_what_does_not_work_offline_is_refused(name, message):
    with pytest.raises(ConfigError, match=message):
        check_tokenizer(name)


@pytest.mark.skipif(importlib.util.find_spec("MeCab") is not None, reason="MeCab is installed")
def test_a_missing_package_is_named():
    with pytest.raises(ConfigError, match=r"run pip install 'sacrebleu\[ja\]', or use auto"):
        check_tokenizer("ja-mecab")
