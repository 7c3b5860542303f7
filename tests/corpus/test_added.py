"""Text that is added later: the corpus stays what it was, and nothing held out is trained on."""

import random

import numpy as np
import pytest

from pipeline.corpus.sources.table import TableSource
from pipeline.corpus.sources.text import TextSource
from pipeline.corpus.text.examples import SPLITS, read_corpus_meta, read_split
from pipeline.corpus.tokens.tokenize import tokenize_corpus, training_texts
from pipeline.corpus.tokens.tokenizer import train_tokenizer
from pipeline.corpus.tokens.tokens import TokenMeta, TokenSet
from pipeline.errors import ConfigError
from pipeline.provenance import read_json


def sentence(seed: int, words: int = 12) -> str:
    draw = random.Random(seed)
    return " ".join("".join(draw.choices("abcdefghij", k=4)) for _ in range(words))


BASE = [sentence(i) for i in range(60)]


@pytest.fixture
def text(tmp_path):
    """Write lines to a file; return the source of them."""

    def write(name: str, lines: list[str]) -> TextSource:
        (tmp_path / name).write_text("\n".join(lines) + "\n")
        return TextSource(files=name, examples="line")

    return write


@pytest.fixture
def rows(tmp_path):
    """Read the rows of a prepared split."""
    return lambda split="train", output="text": list(read_split(tmp_path / output, split))


def files_below(path):
    return {one.relative_to(path): one.read_bytes() for one in path.rglob("*") if one.is_file()}


def test_the_corpus_stays_what_it_was_and_the_new_rows_follow(tmp_path, prepare, text, rows):
    base = text("base.txt", BASE)
    plain = prepare(base, output="plain")
    more = [text("a.txt", [sentence(i) for i in (100, 101)]), text("b.txt", [sentence(102)])]
    meta = prepare(base, added=more)
    assert meta.parts == (plain.rows["train"], 2, 1)
    assert meta.rows == plain.rows | {"train": plain.rows["train"] + 3}
    assert [row["text"] for row in rows()[-3:]] == [sentence(i) for i in (100, 101, 102)]
    assert [row["source_row"] for row in rows()[-3:]] == [60, 61, 62]
    assert rows()[:-3] == rows(output="plain")
    for split in SPLITS[1:]:
        assert rows(split) == rows(split, "plain")
    assert meta.digest != plain.digest
    assert read_corpus_meta(tmp_path / "text") == meta
    assert [list(source["files"]) for source in meta.added] == [["a.txt"], ["b.txt"]]


def test_a_corpus_that_nothing_is_added_to_is_written_as_ever(tmp_path, prepare, text):
    prepare(text("base.txt", BASE))
    assert not {"parts", "added"} & read_json(tmp_path / "text" / "corpus.json").keys()


def test_text_added_later_still_moves_nothing(prepare, text, rows):
    base, first = text("base.txt", BASE), text("a.txt", [sentence(i) for i in range(100, 110)])
    prepare(base, added=[first], output="one")
    meta = prepare(base, added=[first, text("b.txt", [sentence(200)])])
    assert rows()[: sum(meta.parts[:2])] == rows(output="one")


def test_what_is_held_out_is_not_trained_on(prepare, text, rows, tmp_path):
    base = text("base.txt", BASE)
    prepare(base)
    (test, *_), (validation, *_) = rows("test"), rows("validation")
    leaks = [
        test["text"],
        f"{test['text'].upper()}!",
        f"{sentence(300)} {validation['text']} {sentence(301)}",
        " ".join(validation["text"].split()[:10]),
    ]
    meta = prepare(base, added=[text("more.txt", [*leaks, sentence(302)])])
    assert meta.parts[1:] == (1,)
    assert meta.dropped["added_held_out"] == len(leaks)
    assert rows()[-1]["text"] == sentence(302)


def test_of_a_text_of_paragraphs_only_the_held_out_one_goes(prepare, text, rows, tmp_path):
    base = TextSource(files="base.txt", examples="paragraph", join_characters=1)
    (tmp_path / "base.txt").write_text("\n\n".join(BASE))
    prepare(base)
    held_out = rows("test")[0]["text"]
    kept = [sentence(400, 30), sentence(401, 30)]
    (tmp_path / "more.txt").write_text(f"{kept[0]}\n\n{held_out}\n\n{kept[1]}")
    meta = prepare(base, added=[TextSource(files="more.txt", examples="paragraph")])
    assert [row["text"] for row in rows()[-2:]] == kept
    assert meta.dropped["added_held_out"] == 1


def test_what_was_there_already_is_left_out(prepare, text, rows):
    """So the larger file may be named as it is."""
    meta = prepare(
        text("base.txt", BASE),
        added=[text("larger.txt", [*BASE, sentence(500)]), text("c.txt", [sentence(500), "new"])],
    )
    assert meta.parts[1:] == (1, 1)
    assert [row["text"] for row in rows()[-2:]] == [sentence(500), "new"]
    trained = meta.parts[0]
    assert meta.dropped == {"added_before": trained + 1, "added_held_out": len(BASE) - trained}


def test_only_training_rows_of_an_added_source_are_taken_up_to_its_limit(prepare, text, tmp_path):
    base = text("base.txt", BASE)
    text("train.txt", [sentence(i) for i in range(600, 620)])
    text("test.txt", [sentence(i) for i in range(620, 625)])
    files = {"train": "train.txt", "test": "test.txt"}
    more = TextSource(files=files, examples="line", limit=7)
    meta = prepare(base, added=[more])
    assert meta.parts[1:] == (7,)
    assert meta.dropped["added_not_for_training"] == 5


@pytest.mark.parametrize(
    ("columns", "rows", "match"),
    [
        ({"label": "y"}, [["t 1", "c", ""]], r"label 'c' in a train row, expected one of 'a', 'b'"),
        ({}, [["t 1", "a", ""]], r"corpus\.added\.0\.label: missing"),
        ({"label": "y", "pair": "z"}, [["t 1", "a", "p"]],
         r"corpus\.added\.0: found pairs, expected single texts as in corpus\.source"),
        ({"label": "y"}, [["text 3", "b", ""]],
         r"corpus\.added\.0: found 1 examples, none of them new .*left out 1 added_(before|held)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_corpus_is_refused(prepare, write_table, columns, rows, match):
    table = [["text", "y"], *([f"text {i}", "ab"[i % 2]] for i in range(40))]
    write_table("base.tsv", table)
    write_table("more.tsv", [["text", "y", "z"], *rows])
    base = TableSource(files="base.tsv", label="y")
    with pytest.raises(ConfigError, match=match):
        prepare(base, "classification", added=[TableSource(files="more.tsv", **columns)])


def test_classes_are_those_of_the_corpus_itself(prepare, write_table):
    write_table("base.tsv", [["text", "y"], *([f"text {i}", "ab"[i % 2]] for i in range(40))])
    write_table("more.tsv", [["text", "y"], ["new 1", "b"], ["new 2", "b"]])
    base, more = (TableSource(files=f"{name}.tsv", label="y") for name in ("base", "more"))
    meta = prepare(base, "classification", added=[more])
    assert meta.classes == ("a", "b")
    assert meta.parts[1:] == (2,)


def tokenized(tmp_path, output: str) -> TokenMeta:
    texts = tmp_path / output
    return tokenize_corpus(
        corpus=texts,
        tokenizer=train_tokenizer(training_texts(texts), vocab=270),
        max_length=16,
        overlong=None,
        output=tmp_path / f"tokens-{output}",
    )


def test_token_rows_and_the_tokenizer_of_the_corpus_stay_what_they_were(tmp_path, prepare, text):
    """Texts are longer than a row, so parts are counted in rows and not in texts."""
    base = text("base.txt", BASE)
    prepare(base, output="plain")
    prepare(base, added=[text("more.txt", ["xyz " * 30, sentence(700)])], output="larger")
    before, after = (tokenized(tmp_path, name) for name in ("plain", "larger"))
    assert before.parts == ()
    assert "parts" not in read_json(tmp_path / "tokens-plain" / "tokens.json")
    assert after.tokenizer_digest == before.tokenizer_digest
    assert after.digest != before.digest
    assert after.first_rows == before.first_rows == before.rows["train"]
    assert sum(after.parts) == after.rows["train"]
    plain, larger = (TokenSet.load(tmp_path / f"tokens-{name}") for name in ("plain", "larger"))
    assert larger.meta == after
    train = larger.split("train")
    assert list(train.select(range(after.first_rows))) == list(plain.split("train"))
    added = np.array(train["source_row"])[after.first_rows :]
    assert set(added.tolist()) == {60, 61}
    for split in SPLITS[1:]:
        assert list(larger.split(split)) == list(plain.split(split))
        assert files_below(larger.path / split).keys() == files_below(plain.path / split).keys()
