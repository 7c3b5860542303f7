import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertTokenizer, PreTrainedTokenizerFast

from pipeline.corpus.sources.table import TableSource
from pipeline.corpus.sources.text import TextSource
from pipeline.corpus.text.examples import SPLITS, read_split
from pipeline.corpus.tokens.row_builder import Counts, RowBuilder
from pipeline.corpus.tokens.spans import ends_of, sizes_of
from pipeline.corpus.tokens.tokenize import tokenize_corpus
from pipeline.corpus.tokens.tokenize_text import add_text_rows
from pipeline.corpus.tokens.tokenizer import tokenizer_digest, train_tokenizer
from pipeline.corpus.tokens.tokens import TokenColumns, TokenSet
from pipeline.errors import ConfigError, IntegrityError

LETTERS = "abcdefghijklmnopqrstuvwxyz"


@pytest.fixture
def letters():
    """A tokenizer of single letters between marks, so that lengths can be counted by hand."""
    vocab = {letter: number for number, letter in enumerate(LETTERS)} | {"<s>": 26, "?": 27}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 26)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        pad_token="<s>",
        unk_token="?",
        model_max_length=64,
    )


@pytest.fixture
def bert(tmp_path):
    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocab = {token: number for number, token in enumerate([*marks, *LETTERS])}
    return BertTokenizer(vocab=vocab)


@pytest.fixture
def tokenize(tmp_path):
    def run(tokenizer, max_length=8, overlong=None, output="tokens"):
        tokenize_corpus(
            corpus=tmp_path / "text",
            tokenizer=tokenizer,
            max_length=max_length,
            overlong=overlong,
            output=tmp_path / output,
        )
        return TokenSet.load(tmp_path / output)

    return run


@pytest.fixture
def texts(tmp_path, prepare):
    """Prepare given texts as the training split, with two short held-out ones."""

    def run(*train):
        (tmp_path / "train.txt").write_text("\n".join(train))
        (tmp_path / "held.txt").write_text("xyz\nzyx")
        (tmp_path / "test.txt").write_text("yxz")
        files = {"train": "train.txt", "validation": "held.txt", "test": "test.txt"}
        prepare(TextSource(files=files, examples="line"))

    return run


@pytest.fixture
def pairs(prepare, write_table):
    def run(*train):
        for split, rows in (("train", train), ("validation", train[:1]), ("test", train[:1])):
            cells = [[text, pair, label] for text, pair, label in rows]
            write_table(f"{split}.tsv", [["a", "b", "y"], *cells])
        files = {split: f"{split}.tsv" for split in SPLITS}
        prepare(TableSource(files=files, text="a", pair="b", label="y"), "classification")

    return run


def spelled(ids):
    return "".join((LETTERS + "^?")[one] for one in ids)


def test_long_texts_are_split_into_consecutive_rows(texts, tokenize, letters):
    texts("abc", "abcdefghijk", "abcdefgh", "q")
    tokens = tokenize(letters)
    rows = tokens.split("train")
    assert [(spelled(row["input_ids"]), row["source_row"], row["piece"]) for row in rows] == [
        ("^abc", 0, 0),
        ("^abcdefg", 1, 0),
        ("hijk", 1, 1),
        # The ninth token of the third text stands alone: nothing predicts it.
        ("^abcdefg", 2, 0),
        ("^q", 3, 0),
    ]
    assert tokens.meta.overlong == {"train": 2, "validation": 0, "test": 0}
    assert tokens.meta.dropped == {"train": 1, "validation": 0, "test": 0}
    assert tokens.meta.tokens["train"] == 4 + 8 + 4 + 8 + 2
    assert tokens.meta.targets["train"] == 3 + 7 + 3 + 7 + 1


def test_every_token_is_a_target_but_the_opening_mark(texts, tokenize, letters):
    texts("abcdefghij", "abc")
    rows = tokenize(letters).split("train")
    assert rows["loss_mask"][:] == [[False] + [True] * 7, [True] * 3, [False] + [True] * 3]


def test_truncation_keeps_the_start_and_error_names_the_row(texts, tokenize, letters):
    texts("abc", "abcdefghijk")
    tokens = tokenize(letters, overlong="truncate")
    assert [spelled(ids) for ids in tokens.split("train")["input_ids"]] == ["^abc", "^abcdefg"]
    assert tokens.meta.overlong["train"] == 1
    with pytest.raises(
        ConfigError, match=r"train\.txt:2: 12 tokens, expected at most max_length 8"
    ):
        tokenize(letters, overlong="error")


def test_a_row_without_any_target_is_dropped_and_a_split_of_them_refused(texts, tokenize):
    texts("ab", "a", "b")
    plain = train_tokenizer(["ab"] * 3, vocab=259)
    plain.backend_tokenizer.post_processor = processors.ByteLevel()
    with pytest.raises(ConfigError, match="no row of 3 has a token to learn from"):
        tokenize(plain)


def test_pairs_keep_their_segments_labels_and_masks(pairs, tokenize, bert):
    pairs(("a b", "c", "no"), ("d", "e f", "yes"))
    tokens = tokenize(bert, max_length=16)
    rows = tokens.split("train")
    assert bert.convert_ids_to_tokens(rows[0]["input_ids"]) == [
        "[CLS]",
        "a",
        "b",
        "[SEP]",
        "c",
        "[SEP]",
    ]
    assert rows["token_type_ids"][:] == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 1]]
    assert rows[0]["loss_mask"] == [False, True, True, False, True, False]
    assert tokens.meta.classes == ("no", "yes")
    assert rows["label"][:] == [0, 1]
    assert tokens.meta.columns == ("token_type_ids",)


def test_a_long_pair_loses_from_its_longer_text(pairs, tokenize, bert):
    pairs(("a b c d e f g", "h i", "no"), ("a b", "c", "yes"))
    tokens = tokenize(bert)
    words = bert.convert_ids_to_tokens(tokens.split("train")[0]["input_ids"])
    assert words == ["[CLS]", "a", "b", "c", "[SEP]", "h", "i", "[SEP]"]
    assert tokens.meta.overlong == {"train": 1, "validation": 1, "test": 1}
    with pytest.raises(
        ConfigError, match=r"train\.tsv:2: 12 tokens, expected at most max_length 8"
    ):
        tokenize(bert, overlong="error")
    with pytest.raises(ConfigError, match="'split' would give one label to several rows"):
        tokenize(bert, overlong="split")


def test_an_exact_fit_is_not_overlong(texts, pairs, tokenize, letters, bert):
    texts("abcdefg")
    assert tokenize(letters, overlong="error").meta.overlong["train"] == 0
    pairs(("a b c", "d e", "no"), ("a", "b", "yes"))
    assert tokenize(bert, overlong="error").meta.overlong["train"] == 0


def test_equal_input_gives_equal_files_and_digests(tmp_path, texts, tokenize, letters):
    def files_below(path):
        return {one.relative_to(path): one.read_bytes() for one in path.rglob("*") if one.is_file()}

    texts(*(LETTERS[i:] for i in range(20)))
    first, second = tokenize(letters), tokenize(letters, output="again")
    assert first.meta == second.meta
    assert files_below(first.path) == files_below(second.path)
    assert tokenize(letters, max_length=9).meta.digest != first.meta.digest


def test_every_letter_of_the_corpus_is_in_the_tokens(tmp_path, texts, tokenize, letters):
    texts(*(LETTERS[i:] + LETTERS[:i] for i in range(26)))
    tokens = tokenize(letters, max_length=7)
    found = {}
    for row in tokens.split("train"):
        found[row["source_row"]] = found.get(row["source_row"], "") + spelled(row["input_ids"])
    assert list(found.values()) == [
        f"^{text}" for text in read_split(tmp_path / "text", "train")["text"]
    ]


def test_the_saved_tokenizer_is_the_one_used(texts, tokenize, letters):
    texts("abc", "abcdefghijk")
    tokens = tokenize(letters, overlong="truncate")
    saved = PreTrainedTokenizerFast.from_pretrained(tokens.tokenizer_path)
    assert tokenizer_digest(saved) == tokens.meta.tokenizer_digest == tokenizer_digest(letters)
    assert len(saved("a" * 30)["input_ids"]) == 31
    assert tokens.meta.vocab == len(saved) == 28


@pytest.mark.parametrize(
    ("max_length", "message"),
    [(65, "found 65 tokens, expected at most 64"), (2, "found 2 tokens, expected at least 3")],
)
def test_a_length_that_no_row_can_have_is_refused(texts, tokenize, letters, max_length, message):
    texts("abc")
    with pytest.raises(ConfigError, match=message):
        tokenize(letters, max_length=max_length)


def test_a_token_set_that_lost_rows_is_an_integrity_error(tmp_path, texts, tokenize, letters):
    texts("abc", "abcd")
    tokens = tokenize(letters)
    (tokens.path / "train").rename(tokens.path / "gone")
    (tokens.path / "test").rename(tokens.path / "train")
    with pytest.raises(IntegrityError, match="train: 1 rows, expected 2"):
        tokens.split("train")
    with pytest.raises(IntegrityError, match="test: not a readable dataset"):
        tokens.split("test")
    (tokens.path / "tokens.json").write_text("[]")
    with pytest.raises(IntegrityError, match=r"tokens\.json: .*run the stage that writes it again"):
        TokenSet.load(tokens.path)


@pytest.fixture
def answered(tmp_path, prepare):
    """Prepare rows of JSON, the same in every split."""

    def run(task, rows, **columns):
        for split in SPLITS:
            lines = [json.dumps({"text": "a b", **row}) for row in rows]
            (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
        files = {split: f"{split}.jsonl" for split in SPLITS}
        prepare(TableSource(files=files, **columns), task)

    return run


def test_numbers_and_several_classes_are_targets_of_a_row(answered, tokenize, bert):
    answered("regression", [{"y": 2.5}, {"y": -1}], label="y")
    tokens = tokenize(bert)
    assert tokens.split("train")["targets"][:] == [[2.5], [-1.0]]
    assert tokens.meta.outputs == 1
    answered("multi-label", [{"y": ["x", "z"]}, {"y": []}, {"y": ["y"]}], labels="y")
    tokens = tokenize(bert)
    assert tokens.split("test")["targets"][:] == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
    assert (tokens.meta.outputs, tokens.meta.classes) == (3, ("x", "y", "z"))
    assert "label" not in tokens.split("train").column_names
    assert (tokens.meta.target_bytes, tokens.meta.text_form) == ({}, {})


def test_targets_are_part_of_a_sets_digest_and_what_measures_read_is_not(
    answered, tokenize, bert, texts, letters
):
    found = []
    for number in (1, 2):
        answered("regression", [{"y": number}, {"y": 3}], label="y")
        found.append(tokenize(bert).meta.digest)
    assert found[0] != found[1]
    texts("abc", "abcd")
    columns = TokenColumns(
        offsets=np.array([0, 2]),
        input_ids=np.array([1, 2], np.int32),
        loss_mask=np.array([True, True]),
        source_row=np.array([0]),
        piece=np.array([0], np.int32),
    )
    more = replace(
        columns,
        target_bytes=np.array([3], np.int32),
        target_words=np.array([1], np.int32),
        prompt_tokens=np.array([1], np.int32),
        references=[["a"]],
    )
    assert columns.digest() == more.digest()
    assert replace(columns, targets=np.ones((1, 2), np.float32)).digest() != columns.digest()


@given(st.lists(st.text("ab é漢\n.", min_size=1, max_size=30), min_size=1, max_size=4))
@settings(max_examples=15)
def test_the_pieces_of_a_text_have_all_its_bytes_but_those_of_their_first_tokens(
    lines,
):
    lines = [f"x{line}y" for line in lines]
    trained = train_tokenizer(lines, vocab=270)
    rows = RowBuilder(has_types=False)
    columns = {"text": lines, "source": lines, "source_row": list(range(len(lines)))}
    add_text_rows(
        rows,
        Counts(),
        datasets.Dataset.from_dict(columns),
        trained,
        max_length=5,
        overlong="split",
    )
    for number, text in enumerate(lines):
        encoded = trained(text, return_offsets_mapping=True)
        ends = ends_of(np.array(encoded["offset_mapping"]), len(text))
        in_bytes, _ = sizes_of(text, ends)
        # A last token alone is dropped, and the first of every later piece is not predicted.
        unpredicted = sum(int(in_bytes[i]) for i in range(0, len(in_bytes), 5))
        mine = [n for n, row in enumerate(rows.source_row) if row == number]
        found = sum(rows.target_bytes[n] for n in mine)
        assert found == len(text.encode()) - unpredicted
