"""tokenize@T: the tokenizer is trained, the teacher's, or another; what cannot be is named."""

import json
from pathlib import Path

from pipeline.provenance import read_json
from tests.cases import error_line, tiny_params, write_params

TOKENS = Path("data/corpus/tokens/main")


def change(project: Path, **tokens: object) -> dict:
    params = tiny_params()
    params["teachers"]["main"]["tokens"] = {"max_length": 32, **tokens}
    write_params(project, params)
    return params


def test_the_tokenizer_is_trained_on_the_corpus(project):
    assert read_json(TOKENS / "tokens.json")["vocab"] == 300


def test_another_tokenizer_may_be_named(decant, project):
    change(project, tokenizer=str((TOKENS / "tokenizer").resolve()))
    before = read_json(TOKENS / "tokens.json")["digest"]
    assert decant("tokenize", "main").exit_code == 0
    assert read_json(TOKENS / "tokens.json")["digest"] == before


def test_a_text_longer_than_the_context_is_named_when_asked(decant, project):
    change(project, vocab=300, overlong="error")
    result = decant("tokenize", "main")
    assert result.exit_code == 2
    assert "expected at most max_length 32; shorten the text" in error_line(result)
    assert "corpus.txt:" in result.stderr


def test_no_tokenizer_is_an_error_before_the_corpus_is_read(decant, empty):
    change(empty)
    result = decant("tokenize", "main")
    assert result.exit_code == 2
    assert "teachers.main.tokens: no tokenizer; give vocab to train one" in error_line(result)


def test_a_tokenizer_that_is_nowhere_is_named(decant, project):
    change(project, tokenizer="nowhere")
    result = decant("tokenize", "main")
    assert result.exit_code == 2
    assert "nowhere: no tokenizer can be loaded" in error_line(result)


def test_code_of_a_tokenizer_is_not_run_unasked(decant, project):
    folder = project / "foreign"
    folder.mkdir()
    (folder / "code.py").write_text("raise SystemExit('the code ran')")
    (folder / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "code.Config"}}))
    auto_map = {"AutoTokenizer": [None, "code.Tokenizer"]}
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "Tokenizer", "auto_map": auto_map})
    )
    change(project, tokenizer=str(folder))
    result = decant("tokenize", "main")
    assert result.exit_code == 2, result.output
    assert error_line(result)
    assert "the code ran" not in result.output


def test_a_stage_before_that_has_not_run_is_named(decant, empty):
    result = decant("tokenize", "main")
    assert result.exit_code == 3
    assert "data/corpus/text" in error_line(result)


def prepared(decant, folder: Path, rows: list[dict], task: str, **columns: str) -> None:
    params = tiny_params()
    (folder / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = {"kind": "table", "files": "corpus.jsonl", **columns}
    params["corpus"] = {"source": source, "task": task}
    write_params(folder, params)
    assert decant("prepare").exit_code == 0


def test_a_template_stands_around_prompt_and_target(decant, empty):
    rows = [{"text": f"some {n}", "to": f"answer {n}"} for n in range(40)]
    prepared(decant, empty, rows, "prompt-target", target="to")
    change(empty, vocab=300, template="{text} ->{target}")
    assert decant("tokenize", "main").exit_code == 0
    meta = read_json(TOKENS / "tokens.json")
    assert meta["text_form"] == {"template": "{text} ->{target}"}
    assert meta["target_words"]["test"] == 2 * meta["rows"]["test"]
    change(empty, vocab=300, template="{text}")
    result = decant("tokenize", "main")
    assert result.exit_code == 2
    assert "tokens.template: found '{text}', expected {text} and {target}" in error_line(result)


def test_a_chat_template_is_read_from_its_file(decant, empty):
    rows = [
        {"m": [{"role": role, "content": f"{role} {n}"} for role in ("user", "assistant")]}
        for n in range(40)
    ]
    prepared(decant, empty, rows, "messages", messages="m")
    (empty / "chat.jinja").write_text(
        "{%- for turn in messages -%}{%- if turn.role == 'assistant' -%}"
        "{% generation %}{{ turn.content }}{{ eos_token }}{% endgeneration %}"
        "{%- else -%}{{ turn.content }}: {% endif -%}{%- endfor -%}"
    )
    change(empty, vocab=300, chat_template="chat.jinja", chat_date="2025-02-03")
    result = decant("tokenize", "main")
    assert result.exit_code == 0, result.output
    form = read_json(TOKENS / "tokens.json")["text_form"]
    assert form["chat_date"] == "2025-02-03"
    for template, message in (
        (None, "found no chat template, which task messages needs"),
        ("nowhere.jinja", "nowhere.jinja: cannot be read"),
    ):
        change(empty, vocab=300, chat_template=template)
        result = decant("tokenize", "main")
        assert result.exit_code == 2, result.output
        assert message in error_line(result)


def test_the_teachers_own_text_is_asked_for_in_full(decant, empty):
    change(empty, vocab=300, generation={"num_beams": 2})
    result = decant("tokenize", "main")
    assert result.exit_code == 2
    assert "tokens: generation: needs targets: teacher" in error_line(result)
    change(empty, vocab=300, targets="teacher", generation={"top_p": 0.0})
    assert "generation.top_p: found 0.0, expected a number" in error_line(
        decant("tokenize", "main")
    )
