"""Chats: only the assistant's tokens are learnt, and no id depends on the day."""

import json

import pytest

from pipeline.corpus.sources.table import TableSource
from pipeline.corpus.text.examples import SPLITS
from pipeline.corpus.tokens.tokenize import tokenize_corpus, training_texts
from pipeline.corpus.tokens.tokenize_chat import ChatTemplate
from pipeline.corpus.tokens.tokenizer import train_tokenizer
from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.errors import ConfigError

TEMPLATE = """{%- for message in messages -%}
{{ message.role }}:
{%- if message.role == 'assistant' -%}
{% generation %} {{ message.content }}{{ eos_token }}{% endgeneration %}
{%- else %} {{ message.content }}
{% endif -%}
{%- endfor -%}"""
CHAT = [
    {"role": "user", "content": "what is it"},
    {"role": "assistant", "content": "it is 漢 read"},
    {"role": "user", "content": "and what else"},
    {"role": "assistant", "content": "nothing else"},
]


def tokenizer():
    words = " ".join(turn["content"] for turn in CHAT)
    return train_tokenizer([f"user: {words} assistant: "] * 3, vocab=320)


@pytest.fixture
def chats(tmp_path, prepare):
    def run(*rows, split_rows=None):
        for split in SPLITS:
            lines = [json.dumps({"messages": row}) for row in rows]
            (tmp_path / f"{split}.jsonl").write_text("\n".join(lines))
        files = {split: f"{split}.jsonl" for split in SPLITS}
        return prepare(TableSource(files=files, messages="messages"), "messages")

    return run


@pytest.fixture
def tokenize(tmp_path):
    def run(max_length=128, overlong=None, chat_template=TEMPLATE, **form):
        chosen = form.pop("tokenizer", None) or tokenizer()
        tokenize_corpus(
            corpus=tmp_path / "text",
            tokenizer=chosen,
            max_length=max_length,
            overlong=overlong,
            output=tmp_path / "tokens",
            chat_template=chat_template,
            **form,
        )
        return TokenSet.load(tmp_path / "tokens")

    return run


def learnt(row, words):
    """Stretches of the row that are learnt, as text."""
    found, last = [], False
    for token, counts in zip(row["input_ids"], row["loss_mask"], strict=True):
        if counts and not last:
            found.append([])
        if counts:
            found[-1].append(token)
        last = counts
    return [words.decode(ids) for ids in found]


def test_the_assistants_turns_are_learnt_with_their_ends(chats, tokenize):
    chats(CHAT, CHAT[:2])
    words = tokenizer()
    tokens = tokenize()
    rows = list(tokens.split("train"))
    assert learnt(rows[0], words) == [
        " it is 漢 read<|endoftext|>",
        " nothing else<|endoftext|>",
    ]
    assert learnt(rows[1], words) == [" it is 漢 read<|endoftext|>"]
    first = rows[0]
    assert words.decode(first["input_ids"][: first["prompt_tokens"]]).endswith("else\nassistant:")
    assert [row["references"] for row in rows] == [["nothing else"], ["it is 漢 read"]]
    # The ending marks are no text.
    sizes = [len(" it is 漢 read nothing else".encode()), len(" it is 漢 read".encode())]
    assert [row["target_bytes"] for row in rows] == sizes
    assert [row["target_words"] for row in rows] == [6, 4]
    assert set(tokens.meta.text_form) == {"chat_template_sha256", "chat_date"}


def test_the_mask_is_the_librarys_where_the_library_finds_the_turns(chats, tokenize):
    # It loses a turn that begins with a space the tokenizer trims from its offsets.
    plain = TEMPLATE.replace("{% generation %} {{", "{% generation %}{{")
    chats(CHAT, CHAT[:2])
    rows = tokenize(chat_template=plain).split("train")
    for row, chat in zip(rows, (CHAT, CHAT[:2]), strict=True):
        expected = tokenizer().apply_chat_template(
            chat, chat_template=plain, return_dict=True, return_assistant_tokens_mask=True
        )
        assert row["input_ids"] == expected["input_ids"]
        assert row["loss_mask"] == [bool(one) for one in expected["assistant_masks"]]


def test_an_end_mark_outside_the_turn_is_learnt_too(chats, tokenize):
    outside = TEMPLATE.replace(
        "{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"
    )
    chats(CHAT)
    inside = tokenize().split("train")[0]
    assert tokenize(chat_template=outside).split("train")[0] == inside


def test_no_id_depends_on_the_day(chats, tokenize):
    dated = (
        "{%- if date_string is defined -%}{{ date_string }}{%- endif -%}"
        "{%- if strftime_now is defined -%}|{{ strftime_now('%-d %B %Y, %Y-%m-%d %a') }}|"
        "{%- endif -%}" + TEMPLATE
    )
    chats(CHAT)
    row = tokenize(chat_template=dated, chat_date="2024-07-06").split("train")[0]
    begin = tokenizer().decode(row["input_ids"])
    assert begin.startswith("06 Jul 2024|6 July 2024, 2024-07-06 Sat|user:")
    other = tokenize(chat_template=dated).split("train")[0]
    assert other["input_ids"] != row["input_ids"]
    assert other["references"] == row["references"]


def test_a_long_chat_loses_its_end(chats, tokenize):
    chats(CHAT, CHAT[:2])
    whole = tokenize().split("train")[0]
    # Cut inside the second answer, then before it.
    inside = whole["prompt_tokens"] + 1
    row = tokenize(max_length=inside).split("train")[0]
    assert row["input_ids"] == whole["input_ids"][:inside]
    assert (row["prompt_tokens"], row["references"]) == (inside - 1, ["nothing else"])
    tokens = tokenize(max_length=inside - 1)
    row = tokens.split("train")[0]
    assert row["references"] == ["it is 漢 read"]
    assert row["prompt_tokens"] == tokens.split("train")[1]["prompt_tokens"]
    assert tokens.meta.overlong["train"] == 1
    with pytest.raises(ConfigError, match=r"train\.jsonl:1: \d+ tokens, expected at most"):
        tokenize(max_length=inside - 1, overlong="error")
    with pytest.raises(ConfigError, match="'split' would part"):
        tokenize(overlong="split")


def test_chats_without_an_answer_are_dropped_and_counted(chats, tokenize):
    chats(CHAT, CHAT[:1])
    assert tokenize().meta.dropped == dict.fromkeys(SPLITS, 1)
    chats(CHAT[:1])
    with pytest.raises(ConfigError, match="no row of 1 has a token to learn from"):
        tokenize()


def test_the_template_is_the_tokenizers_own_or_given_and_saved(chats, tokenize, tmp_path):
    chats(CHAT)
    own = tokenizer()
    own.chat_template = TEMPLATE
    first = tokenize(chat_template=None, tokenizer=own)
    second = tokenize()
    assert first.meta == second.meta
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(second.tokenizer_path).chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"chat_template": None}, "found no chat template, which task messages needs; set tokens"),
        ({"chat_template": "{{ messages }}"}, r"has no \{% generation %\} mark"),
        ({"chat_date": "today"}, "chat_date: found 'today', expected a day as 2026-01-01"),
        ({"template": "{text}{target}"}, "template: given for task messages"),
        (
            {"chat_template": TEMPLATE + "{{ raise_exception('roles must alternate') }}"},
            r"train\.jsonl:1: the chat template refuses .* \(roles must alternate\)",
        ),
        ({"chat_template": TEMPLATE + "{% if %}"}, r"tokens\.chat_template"),
    ],
)
def test_what_cannot_be_rendered_is_refused_with_the_reason(chats, tokenize, form, message):
    chats(CHAT)
    with pytest.raises(ConfigError, match=message) as error:
        tokenize(**form)
    assert "\n" not in str(error.value)


def test_a_tokenizer_is_trained_on_rendered_chats_without_marks(chats, tmp_path):
    chats(CHAT[:2])
    assert list(training_texts(tmp_path / "text", chat_template=TEMPLATE)) == [
        "user: what is it\nassistant: it is 漢 read"
    ]


def test_a_text_may_not_name_a_function_of_the_template():
    template = ChatTemplate.of(None, "{% generation %}{% endgeneration %}{{ x() }}", "2026-01-01")
    with pytest.raises(ConfigError, match="refuses the turns user"):
        template.render([{"role": "user", "content": "a"}], {}, "here")


def test_an_answer_without_text_leaves_the_others_their_references(chats, tokenize):
    ends_outside = TEMPLATE.replace(
        "{{ eos_token }}{% endgeneration %}", "{% endgeneration %}{{ eos_token }}"
    ).replace("{% generation %} ", " {% generation %}")
    silent = [{**turn} for turn in CHAT]
    silent[1]["content"] = ""
    last = [*CHAT[:3], {"role": "assistant", "content": ""}]
    chats(silent, last)
    words = tokenizer()
    for row, answer in zip(
        tokenize(chat_template=ends_outside).split("test"), (CHAT[3], CHAT[1]), strict=True
    ):
        assert row["references"] == [answer["content"]]
        following = words.decode(row["input_ids"][row["prompt_tokens"] :])
        assert following.startswith(answer["content"])


@pytest.mark.parametrize("wrong", ["messages[0].content + 1", "1 / 0", "messages[9].content"])
def test_what_a_template_cannot_do_is_one_line(wrong):
    source = "{% generation %}{{ " + wrong + " }}{% endgeneration %}"
    template = ChatTemplate.of(None, source, "2026-01-01")
    with pytest.raises(ConfigError, match=r"here: the chat template refuses the turns user \("):
        template.render([{"role": "user", "content": "a"}], {}, "here")


def test_a_prompt_that_is_not_the_generation_prompt_is_warned_of(chats, tokenize, caplog):
    chats(CHAT, CHAT[:2])
    opening = "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenize(chat_template=TEMPLATE + opening)
    assert "generation prompt" not in caplog.text
    tokenize()
    assert "train: in 100.0% of the chats the answer begins after other tokens" in caplog.text
    caplog.clear()
    inside = TEMPLATE.replace("{% generation %} ", " {% generation %}")
    tokenize(chat_template=inside + opening.replace(":", ": "))
    assert "train: in 100.0% of the chats" in caplog.text


CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}
CALLING = [
    {"role": "user", "content": "what is it"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "17 degrees", "tool_call_id": "7", "name": "weather"},
    {"role": "assistant", "content": "it is 17"},
]
# As templates of models that call tools: a call is JSON inside the answer.
CALLS = TEMPLATE.replace(
    "{{ message.content }}{{ eos_token }}",
    "{{ message.reasoning_content }}{{ message.content }}"
    "{% for call in message.tool_calls %}{{ call.function | tojson }}{% endfor %}{{ eos_token }}",
)


def test_calls_of_tools_reach_the_template_and_are_learnt(chats, tokenize):
    chats(CALLING, CALLING[:2])
    words = tokenizer()
    rows = tokenize(chat_template=CALLS).split("train")
    call = '{"name": "weather", "arguments": {"city": "Bonn"}}'
    assert learnt(rows[0], words) == [f" {call}<|endoftext|>", " it is 17<|endoftext|>"]
    assert learnt(rows[1], words) == [f" {call}<|endoftext|>"]
    assert [row["references"] for row in rows] == [["it is 17"], [call]]


def test_reasoning_and_parts_reach_the_template(chats, tokenize):
    thought = {"role": "assistant", "content": "it is", "reasoning_content": "hm "}
    parts = {"role": "user", "content": [{"type": "text", "text": "what"}]}
    both = CALLS.replace(
        "{%- else %} {{ message.content }}",
        "{%- else %}{% for part in message.content %}{{ part.text }}{% endfor %}",
    )
    chats([parts, thought])
    row = tokenize(chat_template=both).split("train")[0]
    assert learnt(row, tokenizer()) == [" hm it is<|endoftext|>"]
    assert row["references"] == ["hm it is"]


ANSWER = {"role": "assistant", "content": "read"}
ONLY_TWO = TEMPLATE.replace("{%- else %}", "{%- elif message.role == 'user' %}")
OUTSIDE = TEMPLATE.replace("{% endgeneration %}", "{% endgeneration %}{{ message.tool_calls }}")
FIRST_CALL = CALLS.replace("in message.tool_calls", "in (message.tool_calls or [])[:1]")


@pytest.mark.parametrize(
    ("template", "turns", "message"),
    [
        (TEMPLATE, CALLING, r"train\.jsonl:1: turn 2 \(assistant\): tool_calls leaves no trace in"),
        (OUTSIDE, CALLING, r"turn 2 \(assistant\): tool_calls leaves .* what is to be learnt"),
        (
            FIRST_CALL,
            [CHAT[0], {"role": "assistant", "content": "", "tool_calls": [CALL, {"x": 1}]}],
            r"turn 2 \(assistant\): tool_calls\[1\] leaves no trace",
        ),
        (
            TEMPLATE,
            [CHAT[0], ANSWER | {"reasoning_content": "hm"}],
            r"turn 2 \(assistant\): reasoning_content leaves no trace",
        ),
        (TEMPLATE, [CHAT[0] | {"name": "Ann"}, ANSWER], r"turn 1 \(user\): name leaves no trace"),
        (
            ONLY_TWO,
            [CHAT[0], {"role": "developer", "content": "a"}, ANSWER],
            r"turn 2 \(developer\): content leaves no trace",
        ),
        (
            TEMPLATE,
            [{"role": "user", "content": [{"type": "text", "text": "what"}]}, ANSWER],
            r"turn 1 \(user\): the chat template writes the list of content as Python prints it",
        ),
        (
            TEMPLATE.replace("message.content }}\n", "message.content[0].text }}\n"),
            [{"role": "user", "content": [{"text": "what"}, {"type": "image"}]}, ANSWER],
            r"turn 1 \(user\): part 2 of content \(image\) leaves no trace",
        ),
    ],
)
def test_what_leaves_no_trace_is_refused_with_row_and_turn(
    chats, tokenize, template, turns, message
):
    chats(turns)
    with pytest.raises(ConfigError, match=message) as error:
        tokenize(chat_template=template)
    assert "\n" not in str(error.value)


def test_a_role_that_is_dropped_later_is_found_by_its_missing_text(chats, tokenize):
    first_only = TEMPLATE.replace(
        "{%- else %}", "{%- elif message.role == 'user' or loop.index == 1 %}"
    )
    system = {"role": "system", "content": "be kind"}
    chats([system, *CHAT], [*CHAT[:2], {**system, "content": "be good"}, *CHAT[2:]])
    with pytest.raises(ConfigError, match=r"train\.jsonl:2: turn 3 \(system\): content leaves"):
        tokenize(chat_template=first_only)
