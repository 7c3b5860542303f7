"""A stage whose inputs are not there says which command writes them, in one line, and runs nothing.

Each is asked of a project in which everything has run, less one file.
"""

import shutil
from pathlib import Path

import pytest

from tests.cases import error_line

TOKENS, STUDENT = "data/corpus/tokens/main", "data/students/aligned"
CASES = {
    "tokenize main": {"data/corpus/text": "prepare", "data/corpus/text/test": "prepare"},
    "teach main": {
        TOKENS: "tokenize main",
        f"{TOKENS}/train": "tokenize main",
        f"{TOKENS}/tokenizer": "tokenize main",
    },
    "capture main": {
        TOKENS: "tokenize main",
        "data/corpus/transfer/main": "generate main",
        "data/teachers/main": "teach main",
    },
    "capture main --verify": {f"{TOKENS}/tokenizer": "tokenize main"},
    "select aligned": {"data/manifests/main": "capture main"},
    "train aligned": {"data/selected/aligned.json": "select aligned"},
    "evaluate-teacher main": {
        f"{TOKENS}/test": "tokenize main",
        "data/teachers/main/model": "teach main",
    },
    "evaluate aligned": {
        f"{TOKENS}/test": "tokenize main",
        f"{STUDENT}/tokenizer.json": "train aligned",
        f"{STUDENT}/model.safetensors": "train aligned",
        "data/selected/aligned.agreement.json": "select aligned",
    },
    "report": {
        "data/metrics/teachers/main.json": "evaluate-teacher main",
        "data/corpus/text/corpus.json": "prepare",
    },
    "compare aligned main": {
        "data/predictions/students/aligned.jsonl": "evaluate aligned",
        "data/metrics/teachers/main.json": "evaluate-teacher main",
    },
}


@pytest.mark.parametrize(
    ("command", "gone", "writer"),
    [(command, gone, writer) for command, found in CASES.items() for gone, writer in found.items()],
)
def test_the_command_that_writes_it_is_named_before_anything_is_run(
    decant, project, command, gone, writer
):
    path = Path(gone)
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    result = decant(*command.split())
    assert result.exit_code in {2, 3}, result.output
    assert error_line(result).endswith(f"run `decant {writer}`")
    # No bar was drawn: nothing was worked through.
    assert "100%" not in result.stderr
