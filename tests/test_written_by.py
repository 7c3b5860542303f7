"""An error names the command that writes what is missing, for each file of a project."""

from pathlib import Path

import pytest

from pipeline.errors import IntegrityError
from pipeline.provenance import read_json
from pipeline.written_by import remedy


@pytest.mark.parametrize(
    ("path", "command"),
    [
        ("data/corpus/text/corpus.json", "prepare"),
        ("data/corpus/text/test", "prepare"),
        ("data/corpus/tokens/main/tokens.json", "tokenize main"),
        ("data/corpus/transfer/main/transfer.json", "generate main"),
        ("data/teachers/main", "teach main"),
        ("/home/me/project/data/teachers/main/teacher.json", "teach main"),
        ("data/manifests/main/store.json", "capture main"),
        ("data/selected/v1.5.json", "select v1.5"),
        ("data/selected/small.agreement.json", "select small"),
        ("data/students/small/tokenizer.json", "train small"),
        ("data/metrics/curves/small.csv", "train small"),
        ("data/metrics/students/small.json", "evaluate small"),
        ("data/predictions/students/small.jsonl", "evaluate small"),
        ("data/metrics/teachers/main.json", "evaluate-teacher main"),
    ],
)
def test_each_file_has_its_command(path, command):
    assert remedy(Path(path)) == f"run `decant {command}`"


def test_a_file_from_elsewhere_has_none():
    assert remedy(Path("elsewhere/config.json")) == "run the stage that writes it again"


def test_a_missing_and_a_broken_file_are_told(tmp_path):
    path = tmp_path / "data" / "selected" / "small.json"
    with pytest.raises(IntegrityError, match=r"small\.json: missing; run `decant select small`"):
        read_json(path)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(IntegrityError, match=r"not readable as JSON .*; run `decant select small`"):
        read_json(path)
