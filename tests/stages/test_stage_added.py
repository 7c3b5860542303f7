"""Text is added to a project in which everything has run: what was there is kept and used."""

import logging
from pathlib import Path

import pytest

from pipeline.errors import IncompatibleError
from pipeline.provenance import read_json
from pipeline.store.reader import StoreReader
from tests.cases import error_line, tiny_params, write_corpus, write_params

STUDENT = Path("data/students/aligned/model.safetensors")
AGAIN = (
    *(("check",), ("prepare",), ("tokenize", "main"), ("teach", "main"), ("generate", "main")),
    *(("capture", "main"), ("select", "aligned"), ("train", "aligned")),
)


@pytest.mark.slow
def test_added_text_leaves_teacher_and_old_store_and_a_student_of_the_first_part(
    decant, project, monkeypatch, caplog
):
    monkeypatch.setenv("COLUMNS", "200")
    (old,) = Path("data/stores").iterdir()
    teacher = read_json(Path("data/teachers/main/teacher.json"))
    student = STUDENT.read_bytes()
    write_corpus(Path("more.txt"), lines=200, seed=1)
    params = tiny_params()
    params["corpus"]["added"] = [{"kind": "text", "files": "more.txt", "examples": "line"}]
    del params["students"]["soft"]
    params["students"]["aligned"]["parts"] = 1
    write_params(Path(), params)
    for arguments in AGAIN:
        with caplog.at_level(logging.INFO):
            result = decant(*arguments)
        assert result.exit_code == 0, result.output
    assert f"segments are taken from store {old.name}" in caplog.text
    again = read_json(Path("data/teachers/main/teacher.json"))
    assert again["made_of"]["tokens"] != teacher["made_of"]["tokens"]
    assert again | {"made_of": None} == teacher | {"made_of": None}
    assert STUDENT.read_bytes() == student
    (new,) = set(Path("data/stores").iterdir()) - {old}
    parts = StoreReader(new).parts
    assert len(parts) == 2
    assert parts[0] == len(StoreReader(old).segments("train"))
    rows = StoreReader(new).plan["spec"]["parts"]
    shown = decant("inspect", str(new)).output
    assert f"{parts[0]} segments of {rows[0]:,} rows; added {parts[1]} segments" in shown
    params["students"]["aligned"]["parts"] = 3
    write_params(Path(), params)
    result = decant("train", "aligned")
    assert result.exit_code == IncompatibleError.exit_code
    assert "has 2 parts of training text, expected at least 3" in error_line(result)
