"""One row of each split shows what `tokenize` would refuse, and refuses nothing else."""

import subprocess
import sys
from typing import Any

import pytest

from pipeline.corpus.text.examples import Example
from pipeline.corpus.tokens.tokenize_one import tokenize_one
from pipeline.corpus.tokens.tokenizer import local_tokenizer
from pipeline.errors import ConfigError
from tests.vocabularies import write_tokenizer

CHAT = ({"role": "user", "content": "what is it"}, {"role": "assistant", "content": "life"})
TURNS = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}"
PROMPT = Example("what is it", target="life", source="a.tsv:1")
ROWS = {
    "causal-lm": Example("what is it", source="a.txt:1"),
    "prompt-target": PROMPT,
    "messages": Example("", messages=CHAT, source="a.jsonl:1"),
    "classification": Example("what is it", label="", source="a.tsv:1"),
    "multi-label": Example("what is it", source="a.tsv:1"),
    "regression": Example("what is it", pair="life", label="none", source="a.tsv:1"),
}


@pytest.mark.parametrize("task", ROWS)
@pytest.mark.parametrize("kind", [None, "fallback"])
def test_rows_of_every_task_pass_with_and_without_a_tokenizer(tmp_path, task, kind):
    tokenizer = kind and write_tokenizer(kind, tmp_path)
    if tokenizer:
        tokenizer.pad_token = "</s>"
    chat: dict[str, Any] = {"chat_template": TURNS} if task == "messages" else {}
    tokenize_one([ROWS[task]], task=task, tokenizer=tokenizer, max_length=16, **chat)


@pytest.mark.parametrize(
    ("task", "form", "message"),
    [
        ("prompt-target", {"template": "{text}"}, "expected {text} and {target}, each once"),
        ("prompt-target", {"template": "{text}{pair}{target}"}, "each once"),
        ("messages", {}, "found no chat template"),
        ("messages", {"chat_template": "{{ messages }}"}, "has no {% generation %} mark"),
        ("messages", {"chat_template": TURNS + "{{ raise_exception('no') }}"}, "a.jsonl:1: the"),
        ("causal-lm", {"chat_template": TURNS}, "chat_template: given for task causal-lm"),
        ("classification", {"overlong": "split"}, "'split' would give one label"),
        ("causal-lm", {"max_length": 2}, "max_length: found 2 tokens"),
    ],
)
def test_what_tokenize_refuses_is_refused(task, form, message):
    with pytest.raises(ConfigError) as error:
        tokenize_one([ROWS[task]], task=task, tokenizer=None, **{"max_length": 16, **form})
    assert message in str(error.value)


def test_lengths_count_only_with_the_true_tokenizer(tmp_path):
    long = [Example("what is it " * 9, source="b.txt:1")]
    how: dict[str, Any] = {"task": "causal-lm", "max_length": 16, "overlong": "error"}
    tokenize_one(long, tokenizer=None, **how)
    with pytest.raises(ConfigError, match=r"b\.txt:1: \d+ tokens, expected at most"):
        tokenize_one(long, tokenizer=write_tokenizer("bytes", tmp_path), **how)


def test_an_example_without_a_target_is_passed_over():
    rows = [PROMPT, Example("what", target="", source="b.tsv:1")]
    tokenize_one(rows, task="prompt-target", tokenizer=None, max_length=16)


def test_a_tokenizer_is_loaded_only_where_it_is_local(tmp_path):
    write_tokenizer("bytes", tmp_path)
    assert local_tokenizer(tmp_path) is not None
    assert local_tokenizer("someone/never-fetched") is None
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="no tokenizer can be loaded") as error:
        local_tokenizer(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "tokenizer.json").unlink()
    assert local_tokenizer(tmp_path) is None


def test_no_torch_is_loaded(tmp_path):
    write_tokenizer("bytes", tmp_path)
    program = (
        "import sys; from pipeline.corpus.tokens.tokenize_one import tokenize_one; "
        "from pipeline.corpus.tokens.tokenizer import local_tokenizer; "
        "from pipeline.corpus.text.examples import Example; "
        f"tokenize_one([Example('what')], task='causal-lm', max_length=9, "
        f"tokenizer=local_tokenizer({str(tmp_path)!r})); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
