from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus.text.examples import SPLITS, Example
from pipeline.corpus.text.splits import carve, deal_splits, limit_rows
from pipeline.errors import ConfigError


def deal(examples, task="classification", unit="example", seed=0, share=0.1):
    return deal_splits(
        examples, task=task, seed=seed, validation_share=share, test_share=share, unit=unit
    )


def rows(count, split=None, label="1", prefix="text"):
    return [
        Example(text=f"{prefix} {i}", label=label, split=split, source_row=i) for i in range(count)
    ]


def count(dealt):
    return {split: len(examples) for split, examples in dealt.splits.items()}


def test_shares_are_met_and_nothing_is_lost_or_doubled():
    dealt = deal(rows(200))
    assert count(dealt) == {"train": 160, "validation": 20, "test": 20}
    assert Counter(one.source_row for part in dealt.splits.values() for one in part) == Counter(
        range(200)
    )


@settings(max_examples=50, deadline=None)
@given(st.integers(3, 40), st.integers(0, 9), st.floats(0.001, 0.49))
def test_every_split_gets_a_row_whatever_the_share(number, seed, share):
    dealt = carve(rows(number), {"test": share, "validation": share}, seed=seed, task="causal-lm")
    assert all(dealt[split] for split in SPLITS)
    assert sum(map(len, dealt.values())) == number


def test_carving_does_not_depend_on_row_order_and_does_on_the_seed():
    examples = rows(100)

    def held_out(seed, given):
        return {one.text for one in deal(given, seed=seed).splits["test"]}

    assert held_out(1, examples) == held_out(1, examples[::-1])
    assert held_out(1, examples) != held_out(2, examples)


def test_equal_texts_and_groups_are_never_parted():
    twins = [Example(text=f"Row {i // 3}" + "!" * (i % 3)) for i in range(150)]
    grouped = [Example(text=f"unlike {i}", group=f"g{i // 5}") for i in range(150)]
    for examples, key in (
        (twins, lambda one: one.text.strip("!")),
        (grouped, lambda one: one.group),
    ):
        homes = {}
        for split, part in deal(examples).splits.items():
            for one in part:
                assert homes.setdefault(key(one), split) == split


def test_official_splits_are_kept():
    examples = rows(5, "train") + rows(3, "validation") + rows(2, "test")
    dealt = deal(examples)
    assert count(dealt) == {"train": 5, "validation": 3, "test": 2}
    assert set(dealt.origin.values()) == {"official"}


@pytest.mark.parametrize("placeholder", ["-1", "", None])
def test_a_test_split_without_labels_is_replaced_by_validation(placeholder):
    examples = (
        rows(40, "train") + rows(9, "validation", prefix="dev") + rows(7, "test", placeholder)
    )
    dealt = deal(examples)
    assert count(dealt) == {"train": 36, "validation": 4, "test": 9}
    assert dealt.origin == {"train": "carved", "validation": "carved", "test": "validation"}


def test_an_absent_test_split_is_replaced_by_validation():
    assert count(deal(rows(40, "train") + rows(9, "validation")))["test"] == 9


def test_minus_one_as_a_real_class_keeps_the_test_split():
    examples = rows(9, "train", "-1") + rows(9, "train", "1") + rows(3, "test", "-1")
    assert count(deal(examples))["test"] == 3


COPY = "these are more than eight words that were copied from the training text"


def test_copies_leave_carved_splits_and_stay_in_published_ones():
    texts = [*(f"text {i}" for i in range(60)), *(f"{COPY} {i}" for i in range(60))]
    dealt = deal([Example(text=text) for text in texts])
    held_out = [one.text for split in ("test", "validation") for one in dealt.splits[split]]
    assert held_out
    assert not any(COPY in text for text in held_out)
    assert dealt.dropped["held_out_near_duplicates"] > 0

    published = [Example(text=COPY, label="1", split=split) for split in SPLITS]
    assert count(deal(published)) == dict.fromkeys(SPLITS, 1)


def test_by_paragraph_only_the_copied_paragraph_goes():
    texts = [f"own words of text {i} which occur nowhere else {i}{i}\n\n{COPY}" for i in range(30)]
    dealt = deal([Example(text=text) for text in texts], task="causal-lm", unit="paragraph")
    for split in ("test", "validation"):
        assert dealt.splits[split]
        assert all("own words" in one.text and COPY not in one.text for one in dealt.splits[split])


def test_too_little_text_is_refused_with_what_to_do():
    with pytest.raises(ConfigError, match="found no text"):
        deal([])
    with pytest.raises(ConfigError, match="found 2 different examples, expected at least 3"):
        deal(rows(2))
    with pytest.raises(ConfigError, match=r"0 train, 2 validation, .*add files\.train"):
        deal(rows(2, "validation"))


def test_a_limit_is_a_seeded_choice_in_reading_order():
    chosen = [one.source_row for one in limit_rows(rows(50), 5, seed=3)]
    assert len(chosen) == 5
    assert chosen == sorted(chosen) != list(range(5))
    assert limit_rows(rows(3), 5, seed=3) == rows(3)


@pytest.mark.parametrize(
    ("task", "answered", "unanswered"),
    [
        ("prompt-target", {"target": "x"}, {"target": ""}),
        ("multi-label", {"labels": ("x",)}, {"labels": None}),
        ("multi-label", {"labels": ("x",)}, {"labels": ()}),
        ("regression", {"label": "2.5"}, {"label": "-1.0"}),
    ],
)
def test_a_test_split_without_answers_is_replaced_for_every_task(task, answered, unanswered):
    examples = [
        *(Example(f"a {i}", split="train", **answered) for i in range(20)),
        *(Example(f"b {i}", split="validation", **answered) for i in range(5)),
        *(Example(f"c {i}", split="test", **unanswered) for i in range(5)),
    ]
    dealt = deal(examples, task=task)
    assert dealt.origin["test"] == "validation"
    assert [one.text for one in dealt.splits["test"]] == [f"b {i}" for i in range(5)]


def test_one_question_with_several_answers_is_never_parted():
    asked = [{"role": "user", "content": "ask 1"}, {"role": "assistant", "content": "so"}]
    prompts = [Example(f"ask {i // 4}", target=f"answer {i}") for i in range(120)]
    chats = [
        Example("", messages=({"role": "user", "content": f"ask {i // 4}"}, asked[1]), label=str(i))
        for i in range(120)
    ]
    for examples, task in ((prompts, "prompt-target"), (chats, "messages")):
        homes = {}
        dealt = deal(examples, task=task)
        assert count(dealt) == {"train": 96, "validation": 12, "test": 12}
        for split, part in dealt.splits.items():
            for one in part:
                assert homes.setdefault(one.texts[0], split) == split


def test_a_copied_target_leaves_a_carved_split():
    examples = [
        Example(f"unlike {i} {i}{i}", target=f"{COPY} {i}" if i < 60 else f"own {i}")
        for i in range(120)
    ]
    dealt = deal(examples, task="prompt-target")
    for split in ("test", "validation"):
        assert not any(COPY in one.target for one in dealt.splits[split])
    assert dealt.dropped["held_out_near_duplicates"] > 0


@pytest.mark.parametrize("splits", [("train",), SPLITS])
def test_training_without_any_target_is_named(splits):
    examples = [
        Example(text=f"{s} {i}", target="" if s == "train" else "x", split=s)
        for s in splits
        for i in range(4)
    ]
    with pytest.raises(ConfigError, match=r"corpus\.source\.target: no training row has"):
        deal(examples, task="prompt-target")
