"""A cut tokenizer writes texts it was cut for in the same pieces, and can write all others."""

import json
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerFast as FastTokenizer

from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.student.vocabulary.smaller_tokenizer import cut_tokenizer
from tests.vocabularies import KINDS, TEXTS, write_tokenizer

ADDED = ("<|user|>", "<|tool|>")
UNSEEN = ["zebras quiz", "Überraschung!", "naïve 東京 🙂", "the other 12345", "x", "(a+b)**2 == c"]


def pieces(tokenizer: FastTokenizer, text: str) -> list[str]:
    return tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"])


def used_by(tokenizer: FastTokenizer, texts: list[str]) -> set[int]:
    return {number for text in texts for number in tokenizer(text)["input_ids"]}


def cut(source: Path, used: set[int], output: Path) -> FastTokenizer:
    """Cut, save, and load as anyone would."""
    found = cut_tokenizer(source, used)
    output.mkdir(exist_ok=True)
    found.save(output)
    smaller = AutoTokenizer.from_pretrained(output)
    assert len(smaller) == len(found.ids)
    whole = AutoTokenizer.from_pretrained(source)
    numbers = list(range(len(smaller)))
    assert smaller.convert_ids_to_tokens(numbers) == whole.convert_ids_to_tokens(list(found.ids))
    return smaller


@cache
def written(kind: str) -> tuple[Path, FastTokenizer]:
    path = Path(mkdtemp())
    write_tokenizer(kind, path, added=ADDED)
    return path, AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(chosen=st.sets(st.integers(0, len(TEXTS) - 1), min_size=1, max_size=12))
def test_texts_it_was_cut_for_keep_their_pieces(kind, chosen, tmp_path_factory):
    source, whole = written(kind)
    texts = [TEXTS[number] for number in sorted(chosen)]
    smaller = cut(source, used_by(whole, texts), tmp_path_factory.mktemp("cut"))
    assert len(smaller) <= len(whole)
    for text in texts:
        assert pieces(smaller, text) == pieces(whole, text), text


@pytest.mark.parametrize("kind", KINDS)
def test_other_texts_are_still_written(kind, tmp_path):
    source, whole = written(kind)
    smaller = cut(source, used_by(whole, TEXTS[:3]), tmp_path / "cut")
    assert len(smaller) < len(whole)
    for text in [*TEXTS[3:40], *UNSEEN]:
        ids = smaller(text)["input_ids"]
        assert ids
        if kind in ("bytes", "fallback"):
            decode = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
            assert smaller.decode(ids, **decode) == text
        elif kind != "words":  # unknown to the one what was unknown to the other
            assert (smaller.unk_token_id in ids) == (whole.unk_token_id in whole(text)["input_ids"])


@pytest.mark.parametrize("kind", KINDS)
def test_special_and_added_tokens_stay_and_frame_texts(kind, tmp_path):
    source, whole = written(kind)
    smaller = cut(source, used_by(whole, TEXTS[:3]), tmp_path / "cut")
    assert smaller.all_special_tokens == whole.all_special_tokens
    for text, pair in ((f"{ADDED[1]} the {ADDED[0]}", None), ("the", "with")):
        ours, theirs = smaller(text, pair)["input_ids"], whole(text, pair)["input_ids"]
        if kind == "words" or pair is None:
            kept = [p for p in whole.convert_ids_to_tokens(theirs) if p in ADDED]
            assert [p for p in smaller.convert_ids_to_tokens(ours) if p in ADDED] == kept
        else:
            assert smaller.decode(ours) == whole.decode(theirs)


def test_all_ids_used_is_the_same_tokenizer(tmp_path):
    for kind in KINDS:
        source, whole = written(kind)
        smaller = cut(source, set(range(len(whole))), tmp_path / kind)
        assert smaller.get_vocab() == whole.get_vocab()
        assert [pieces(smaller, text) for text in UNSEEN] == [pieces(whole, t) for t in UNSEEN]


@pytest.mark.parametrize("name", ["stories260K", "tokenizer-gpt2", "tokenizer-bert-base-uncased"])
def test_real_tokenizers(name, shared, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "design.md").read_text()
    lines = [line for line in text.splitlines() if line.strip()][:60]
    AutoTokenizer.from_pretrained(shared / "models" / name).save_pretrained(tmp_path / "whole")
    whole = AutoTokenizer.from_pretrained(tmp_path / "whole")
    smaller = cut(tmp_path / "whole", used_by(whole, lines), tmp_path / "cut")
    if len(whole) > 1000:
        assert len(smaller) < len(whole) / 5
    assert [pieces(smaller, line) for line in lines] == [pieces(whole, line) for line in lines]
    for line in UNSEEN:
        assert smaller(line)["input_ids"]
    assert type(smaller) is type(whole)


def test_merges_of_an_old_file_and_affixes(tmp_path):
    """Strings instead of pairs, no type; GPT-1 marks a word's end, some BPE what continues one."""
    vocab = {p: i for i, p in enumerate(["a", "b", "c", "c</w>", "ab", "abc</w>", "ca", "b</w>"])}
    model = {
        "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
        "end_of_word_suffix": "</w>", "fuse_unk": False, "vocab": vocab,
        "merges": ["a b", "ab c</w>", "c a"],
    }  # fmt: skip
    backend = json.loads(Tokenizer(models.BPE()).to_str()) | {"model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    found = cut_tokenizer(tmp_path, {vocab["abc</w>"]})
    cut_backend = json.loads(found.files["tokenizer.json"])["model"]
    assert set(cut_backend["vocab"]) == set(vocab) - {"ca"}
    assert cut_backend["merges"] == [["a", "b"], ["ab", "c</w>"]]
    model |= {"end_of_word_suffix": None, "continuing_subword_prefix": "##"}
    model["vocab"] = {p: i for i, p in enumerate(["a", "##b", "##c", "ab", "abc", "##bc", "b"])}
    model["merges"] = ["a ##b", "ab ##c", "##b ##c"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend | {"model": model}))
    found = cut_tokenizer(tmp_path, {model["vocab"]["abc"]})
    cut_backend = json.loads(found.files["tokenizer.json"])["model"]
    assert set(cut_backend["vocab"]) == {"a", "##b", "##c", "ab", "abc", "b"}
    assert cut_backend["merges"] == [["a", "##b"], ["ab", "##c"]]


def test_what_cannot_be_cut_is_one_line(tmp_path):
    with pytest.raises(IntegrityError, match=r"tokenizer\.json: not readable as JSON"):
        cut_tokenizer(tmp_path, {1})
    backend = json.loads(Tokenizer(models.BPE()).to_str())
    backend["model"] |= {"type": "Strange"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
    with pytest.raises(IncompatibleError, match="model is Strange, expected BPE, WordPiece"):
        cut_tokenizer(tmp_path, {1})
