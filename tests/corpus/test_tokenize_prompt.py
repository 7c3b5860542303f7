"""Prompt and target: what is learnt, what is cut, and what a template may be."""

from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.sources.table import TableSource
from pipeline.corpus.text.examples import SPLITS
from pipeline.corpus.tokens.tokenize import tokenize_corpus, training_texts
from pipeline.corpus.tokens.tokenize_prompt import Template
from pipeline.corpus.tokens.tokenizer import load_tokenizer, train_tokenizer
from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.errors import ConfigError
from tests.vocabularies import write_tokenizer

TRAINED = train_tokenizer(["some few words to read", "und einige zu schreiben"] * 3, vocab=300)


@pytest.fixture
def prompts(prepare, write_table):
    """Prepare rows of text and target, the same in every split."""

    def run(*rows, **columns):
        for split in SPLITS:
            write_table(f"{split}.tsv", [["text", "target", *columns], *map(list, rows)])
        files = {split: f"{split}.tsv" for split in SPLITS}
        named = {column: column for column in columns}
        prepare(TableSource(files=files, target="target", **named), "prompt-target")

    return run


@pytest.fixture
def tokenize(tmp_path):
    def run(max_length=64, overlong=None, tokenizer=TRAINED, **form):
        tokenize_corpus(
            corpus=tmp_path / "text",
            # It learns its context from the first rows it is used for.
            tokenizer=deepcopy(tokenizer),
            max_length=max_length,
            overlong=overlong,
            output=tmp_path / "tokens",
            **form,
        )
        return TokenSet.load(tmp_path / "tokens")

    return run


def parts(row):
    """Prompt and target of a row, as text."""
    cut = row["prompt_tokens"]
    return tuple(TRAINED.decode(ids) for ids in (row["input_ids"][:cut], row["input_ids"][cut:]))


def test_only_the_target_and_its_end_are_learnt(prompts, tokenize):
    prompts(["some words", "zu schreiben"], ["to read", "einige"])
    tokens = tokenize(template="{text} =>{target}")
    rows = list(tokens.split("train"))
    assert parts(rows[0]) == ("<|endoftext|>some words =>", "zu schreiben<|endoftext|>")
    for row in rows:
        length, prompt = len(row["input_ids"]), row["prompt_tokens"]
        assert row["loss_mask"] == [False] * prompt + [True] * (length - prompt)
        assert row["input_ids"][-1] == TRAINED.eos_token_id
    assert [row["target_bytes"] for row in rows] == [len("zu schreiben"), len("einige")]
    assert [row["target_words"] for row in rows] == [2, 1]
    assert [row["references"] for row in rows] == [["zu schreiben"], ["einige"]]
    assert tokens.meta.target_bytes["train"] == len("zu schreibeneinige")
    assert tokens.meta.target_words["test"] == 3
    assert tokens.meta.targets["train"] == sum(map(sum, tokens.split("train")["loss_mask"]))
    assert tokens.meta.text_form == {"template": "{text} =>{target}"}
    assert tokens.meta.outputs == 0


def test_the_prompt_is_tokenised_as_generation_will_and_never_merges_with_the_target(
    prompts, tokenize
):
    prompts(["so", "me"])
    row = tokenize(template="{text}{target}").split("train")[0]
    alone = [TRAINED(text, add_special_tokens=False)["input_ids"] for text in ("so", "me")]
    assert row["input_ids"] == [0, *alone[0], *alone[1], 0]
    assert row["prompt_tokens"] == 1 + len(alone[0])


def test_a_long_text_loses_its_end_and_nothing_else_does(prompts, tokenize):
    words = "some few words to read und einige zu schreiben " * 4
    prompts([words.strip(), "zu schreiben"], ["some", "zu"])
    whole = tokenize(max_length=256, template="Say: {text}\nSo: {target}").split("train")[0]
    tokens = tokenize(max_length=32, template="Say: {text}\nSo: {target}")
    row = tokens.split("train")[0]
    prompt, target = parts(row)
    text = prompt.removeprefix("<|endoftext|>Say: ").removesuffix("\nSo:")
    assert len(prompt) - len(text) == len("<|endoftext|>Say: \nSo:")
    assert words.startswith(text)
    assert text
    assert target == " zu schreiben<|endoftext|>"
    assert 30 <= len(row["input_ids"]) <= 32
    assert row["target_bytes"] == whole["target_bytes"]
    assert tokens.meta.overlong["train"] == 1
    assert tokens.meta.cut_targets["train"] == 0


@given(st.text("abü 漢🙂", min_size=1, max_size=40), st.integers(12, 40))
def test_whatever_the_text_the_row_fits_and_the_template_stays(text, room):
    from pipeline.corpus.tokens.tokenize_prompt import _shortened

    ids = _shortened(TRAINED, text, "<<", ">>", room)
    assert len(ids) <= room
    found = TRAINED.decode(ids)
    assert found.startswith("<<")
    assert found.endswith(">>")
    assert text.startswith(found[2:-2])


def test_a_target_that_alone_is_too_long_loses_its_end_and_its_mark(prompts, tokenize):
    long = "und einige zu schreiben " * 8
    prompts(["some", long], ["some few", "zu"])
    tokens = tokenize(max_length=16)
    row = tokens.split("train")[0]
    prompt, target = parts(row)
    assert prompt == "<|endoftext|>\n"
    assert len(row["input_ids"]) == 16
    assert long.startswith(target)
    assert row["target_bytes"] == len(target.encode())
    assert tokens.meta.cut_targets["train"] == 1
    assert row["references"] == [long]


def test_what_is_too_long_is_named_and_split_is_refused(prompts, tokenize):
    prompts(["some words " * 20, "zu"], ["some", "zu"])
    with pytest.raises(ConfigError, match=r"train\.tsv:2: \d+ tokens, expected at most max_length"):
        tokenize(max_length=16, overlong="error")
    with pytest.raises(ConfigError, match="'split' would part a target from its prompt"):
        tokenize(overlong="split")


def test_pairs_have_their_place_in_the_template(prompts, tokenize):
    prompts(["some", "zu", "few"], ["to", "und", "read"], pair="pair")
    row = tokenize(template="{pair}|{text}|{target}").split("train")[0]
    assert parts(row)[0] == "<|endoftext|>few|some|"
    assert parts(tokenize().split("train")[0])[0] == "<|endoftext|>some\nfew\n"
    with pytest.raises(ConfigError, match=r"and \{pair\}, each once"):
        tokenize(template="{text}{target}")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{text}", "expected {text} and {target}, each once"),
        ("{text}{text}{target}", "each once"),
        ("{text}{tagret}", "each once"),
        ("{text!r}{target}", "each once"),
        ("{text:>9}{target}", "each once"),
        ("{text} {target}.", "expected {target} at its end"),
        ("{target}{text}", "expected {target} at its end"),
        ("{text {target}", "no template"),
    ],
)
def test_a_template_that_is_none_is_refused(template, message):
    with pytest.raises(ConfigError, match=message):
        Template.parse(template, has_pairs=False)


def test_braces_of_a_template_and_of_texts_stay():
    template = Template.parse("{{a}} {text}{{}}{target}", has_pairs=False)
    assert template.filled("{x}", None, "{target}") == "{a} {x}{}{target}"


def test_a_tokenizer_that_cannot_end_is_refused(prompts, tokenize, real_models):
    prompts(["some", "zu"], ["to", "und"])
    backend = TRAINED.backend_tokenizer
    endless = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>")
    with pytest.raises(ConfigError, match="no eos token, expected one for task prompt-target"):
        tokenize(tokenizer=endless)


def test_published_tokenizers_open_a_prompt_as_they_do_a_text(prompts, tokenize, real_models):
    prompts(["some words", "zu"], ["to", "und"])
    for name, opening in (("stories260K", [1]), ("tokenizer-gpt2", [])):
        tokenizer = load_tokenizer(real_models / name)
        ids = tokenize(tokenizer=tokenizer).split("train")[0]["input_ids"]
        plain = tokenizer("some words\n", add_special_tokens=False)["input_ids"]
        assert ids[: len(opening) + len(plain)] == [*opening, *plain]
        assert ids[-1] == tokenizer.eos_token_id


def test_a_tokenizer_is_trained_on_what_a_model_will_see(tmp_path, prompts):
    prompts(["some", "zu"], ["to", "und"])
    assert list(training_texts(tmp_path / "text", template="{text}->{target}")) == [
        "some->zu",
        "to->und",
    ]
    with pytest.raises(ConfigError, match="chat_template: given for task prompt-target"):
        training_texts(tmp_path / "text", chat_template="x")


@pytest.mark.parametrize("template", ["{text}\nDeutsch: {target}", "{text} {target}"])
@pytest.mark.parametrize("name", ["tokenizer-gpt2", "stories260K", "tokenizer-bert-base-uncased"])
def test_a_row_has_the_tokens_of_the_joined_text(prompts, tokenize, real_models, name, template):
    prompts(["some words", "The house"], ["to read", "Two birds"])
    words = load_tokenizer(real_models / name)
    words.eos_token = words.eos_token or words.sep_token
    tokens = tokenize(tokenizer=words, template=template)
    for row, text, target in zip(
        tokens.split("train"), ["some words", "to read"], ["The house", "Two birds"], strict=True
    ):
        joined = words(template.format(text=text, target=target), add_special_tokens=False)
        assert row["input_ids"][-1 - len(joined["input_ids"]) : -1] == joined["input_ids"]
        prompt = template.format(text=text, target="").rstrip(" ")
        alone = words(prompt, add_special_tokens=False)["input_ids"]
        assert row["prompt_tokens"] == len(alone) + len(row["input_ids"]) - 1 - len(
            joined["input_ids"]
        )
        assert (row["target_bytes"], row["target_words"]) == (len(target), 2)
    moved = None if "bert" in name else " "
    assert tokens.meta.text_form.get("target_begins_with") == moved


@pytest.mark.parametrize("kind", ["wordpiece", "words", "bytes"])
@pytest.mark.parametrize("template", ["{text}\n{target}", "{text}: {target}"])
def test_what_was_the_joined_texts_stays_as_it_was(prompts, tokenize, tmp_path, kind, template):
    prompts(["the people", "their way"], ["my life", "our day"])
    words = write_tokenizer(kind, tmp_path / "words")
    words.eos_token = words.eos_token or words.sep_token or words.pad_token
    row = tokenize(tokenizer=words, template=template).split("train")[0]
    sides = template.format(text="the people", target=""), "their way"
    if kind == "bytes" and template.endswith(" {target}"):
        sides = sides[0][:-1], f" {sides[1]}"
    alone = [words(text, add_special_tokens=False)["input_ids"] for text in sides]
    assert row["input_ids"][row["prompt_tokens"] : -1] == alone[1]
    assert row["input_ids"][: row["prompt_tokens"]][-len(alone[0]) :] == alone[0]


def test_a_border_inside_a_token_is_warned_of_with_its_share(prompts, tokenize, caplog):
    prompts(["einige z", "u schreiben"], ["to ", "Xyz"])
    tokenize(template="{text}{target}")
    said = [record.getMessage() for record in caplog.records if "joined text" in record.message]
    assert said
    assert said[0].startswith("train: in 50.0% of the rows prompt and target have other tokens")
    caplog.clear()
    tokenize(template="{text} = {target}")
    assert not [record for record in caplog.records if "joined text" in record.message]


def test_a_line_end_stays_with_the_prompt_and_a_space_goes_with_the_word(real_models):
    from pipeline.corpus.tokens.tokenize_prompt import space_of_target

    words = load_tokenizer(real_models / "tokenizer-gpt2")
    assert space_of_target(words, " ", ["a: ", "b: "], ["The", "Two"]) == " "
    assert space_of_target(words, "\n", ["a:\n", "b:\n"], ["The", "Two"]) == ""
    assert space_of_target(words, "\n ", ["a:\n ", "b:\n "], ["The", "Two"]) == " "
