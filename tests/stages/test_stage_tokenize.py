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
