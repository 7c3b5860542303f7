"""Tokens are counted where they are, and a sample of the texts tells the rest."""

import numpy as np
import pytest

from pipeline.axes import SPLITS
from pipeline.corpus.text.examples import (
    CorpusMeta,
    Example,
    corpus_digest,
    read_corpus_meta,
    write_corpus,
)
from pipeline.corpus.tokens.tokenize import tokenize_corpus
from pipeline.corpus.tokens.tokenizer import train_tokenizer
from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.planning.token_count import counted, sample_segment, sampled, write_sample
from pipeline.teacher.capture.spec import SegmentOptions
from pipeline.teacher.capture.token_rows import plan_rows

OPTIONS = SegmentOptions(segment_tokens=256, chunk_tokens=64, batch_tokens=256, fraction=0.5)
ROWS = {"train": 1200, "validation": 80, "test": 90}
WORDS = [f"{a}{b}" for a in ("ba", "ce", "di", "fo", "gu") for b in ("lim", "n", "ras", "tok")]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Lines of made-up words, some of them long enough to be split."""
    draw = np.random.default_rng(0)
    place, splits, row = tmp_path_factory.mktemp("count") / "text", {}, 0
    for split, count in ROWS.items():
        splits[split] = []
        for words in draw.integers(3, 60, count).tolist():
            text = " ".join(draw.choice(WORDS, words))
            splits[split].append(Example(text=text, source_row=row))
            row += 1
    meta = CorpusMeta(
        task="causal-lm",
        classes=(),
        has_pairs=False,
        rows=ROWS,
        text_bytes={s: sum(one.text_bytes for one in rows) for s, rows in splits.items()},
        dropped={},
        splits=dict.fromkeys(SPLITS, "official"),
        seed=0,
        source={},
        digest=corpus_digest(splits),
    )
    write_corpus(place, splits, meta)
    return place


def tokenized(corpus, output):
    tokenizer = train_tokenizer(WORDS, vocab=300)
    tokenize_corpus(corpus=corpus, tokenizer=tokenizer, max_length=64, overlong=None, output=output)
    return TokenSet.load(output)


@pytest.fixture(scope="module")
def whole(corpus):
    return tokenized(corpus, corpus.parent / "tokens")


def count_of(corpus, sample, tokens, *, splits_rows):
    return sampled(
        tokens,
        read_corpus_meta(corpus),
        read_corpus_meta(sample),
        splits_rows=splits_rows,
        origin="texts",
    )


@pytest.mark.parametrize("splits_rows", [True, False])
def test_a_sample_tells_tokens_and_segments_within_a_few_percent(
    corpus, whole, tmp_path, splits_rows
):
    sample = write_sample(corpus, tmp_path / "sample", most_bytes=40_000)
    assert read_corpus_meta(sample).rows["train"] < ROWS["train"] / 3
    tokens = tokenized(sample, tmp_path / "tokens")
    found = count_of(corpus, sample, tokens, splits_rows=splits_rows)
    assert not found.is_exact
    for split in ("train", "validation"):
        assert found.tokens(split) == pytest.approx(whole.meta.tokens[split], rel=0.06)
    expected = plan_rows(whole, OPTIONS)
    assert found.plan(OPTIONS).segments == pytest.approx(expected.segments, rel=0.06)


def test_a_small_corpus_is_its_own_sample(corpus, whole, tmp_path):
    assert write_sample(corpus, tmp_path / "sample") == corpus
    found = count_of(corpus, corpus, whole, splits_rows=True)
    assert found.is_exact
    assert "all of it tokenised" in found.origin
    assert {split: found.tokens(split) for split in SPLITS} == whole.meta.tokens


def test_a_token_set_is_counted_and_planned_as_capture_plans_it(whole):
    found = counted(whole.path)
    assert found.is_exact
    plan, expected = found.plan(OPTIONS), plan_rows(whole, OPTIONS)
    for name in ("split", "row", "start", "length", "segment", "slot", "segment_split"):
        assert np.array_equal(getattr(plan, name), getattr(expected, name)), name


@pytest.mark.parametrize("tokens", [10, 300, 10**9])
def test_a_segment_to_probe_is_of_the_rows_that_capture_takes(whole, tokens):
    segment = sample_segment(whole, OPTIONS, tokens)
    plan = plan_rows(whole, OPTIONS)
    of_train = int(plan.length[plan.split == 0].sum())
    assert int(segment.length.sum()) >= min(tokens, of_train - 1)
    assert int(segment.length.sum()) <= min(max(tokens, 1) + 64, of_train)
    rows = whole.split("train").with_format("numpy")
    taken = {tuple(rows[int(row)]["input_ids"]) for row in plan.row[plan.split == 0]}
    for start, length in zip(segment.offset, segment.length, strict=True):
        assert tuple(segment.tokens["input_ids"][start : start + length]) in taken
