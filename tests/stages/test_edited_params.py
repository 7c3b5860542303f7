"""params.yaml is edited while a stage runs: what is recorded is never of other values.

DVC reads the parameters when a stage has ended, so a stage that ended well would stand in
`dvc.lock` with values that it never saw.
"""

import copy
import re
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

import stages.parameters
from pipeline.errors import ConfigError
from stages.parameters import check_unchanged, forget_sections, read_yaml, section
from tests.cases import ROOT, error_line, write_params

STAGES = YAML(typ="safe").load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = Path("params.yaml")
EDITS: dict[str, Any] = {
    "corpus": ("seed", 7),
    "tokens": ("max_length", 31),
    "model": ("trust_remote_code", True),
    "fit": ("epochs", 2),
    "capture": ("segment_tokens", 4096),
    "students": ("extra", {"teacher": "main"}),
    "teachers": ("extra", {"model": {"path": "x"}}),
    "aligned": ("pool_segments", 3),
    "teacher": (None, "other"),
    "evaluate": ("samples", 1),
    "": ("corpus", {"task": "messages"}),
}
"""An edit of each section that a stage tracks, by the last part of its key."""
FINISHES_CHECKPOINTS = ("teach", "train")


def tracked(name: str) -> list[str]:
    """The keys whose values DVC records for a stage, for teacher main and student aligned."""
    stage = STAGES[name]
    one = "aligned" if stage.get("foreach") == "${students}" else "main"
    keys = stage.get("do", stage).get("params", [])
    return ["" if isinstance(key, dict) else key.replace("${key}", one) for key in keys]


def command(name: str) -> list[str]:
    one = {"${students}": ["aligned"], "${teachers}": ["main"]}
    return [name, *one.get(STAGES[name].get("foreach"), [])]


def edited(key: str) -> dict[str, Any]:
    """Parameters in which the section at a key is another."""
    params = copy.deepcopy(read_yaml(PARAMS))
    *parents, last = key.split(".")
    place = params
    for part in parents:
        place = place[part]
    inner, value = EDITS[last]
    if inner is None:
        place[last] = value
    else:
        (place[last] if last else place)[inner] = value
    return params


@pytest.fixture
def edit_after_reading(monkeypatch):
    """Return a function: as soon as a command has read the section at a key, it is edited."""
    plain = stages.parameters._read_section

    def arm(key: str) -> None:
        waiting = [edited(key)]

        def read(params: Path, asked: str) -> Any:
            value = plain(params, asked)
            if asked == key and waiting:
                write_params(Path(), waiting.pop())
            return value

        monkeypatch.setattr(stages.parameters, "_read_section", read)

    return arm


CASES = [(name, key) for name in STAGES for key in tracked(name)]


@pytest.mark.parametrize(("name", "key"), CASES, ids=[f"{n} {k or 'all'}" for n, k in CASES])
def test_no_stage_ends_well_when_what_it_tracks_is_edited(
    name, key, decant, project, edit_after_reading
):
    edit_after_reading(key)
    result = decant(*command(name))
    assert result.exit_code == 2, result.output
    line = error_line(result)
    assert line.startswith("error: params.yaml: changed while this command ran: ")
    inner = EDITS[key.split(".")[-1]][0]
    assert ".".join(filter(None, (key, inner))) in line


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_reads_no_section_but_what_it_tracks(name, decant, project, monkeypatch):
    read: list[str] = []
    plain = stages.parameters._read_section

    def noted(params: Path, key: str) -> Any:
        read.append(key)
        return plain(params, key)

    monkeypatch.setattr(stages.parameters, "_read_section", noted)
    assert decant(*command(name)).exit_code == 0
    assert set(read) == set(tracked(name))


@pytest.mark.parametrize("name", FINISHES_CHECKPOINTS)
def test_a_trained_model_stays_what_it_was_and_its_checkpoints_wait(
    name, decant, project, edit_after_reading, caplog
):
    caplog.set_level("INFO")
    (key,) = [key for key in tracked(name) if key.endswith((".fit", ".aligned"))]
    folder = Path("data/students/aligned" if name == "train" else "data/teachers/main")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    params = read_yaml(PARAMS)
    edit_after_reading(key)
    assert decant(*command(name)).exit_code == 2
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    checkpoints = list(Path("data/work", name).glob("*/checkpoint-*/complete.json"))
    assert checkpoints
    write_params(Path(), params)
    result = decant(*command(name))
    assert result.exit_code == 0, result.output
    assert "resuming from" in caplog.text
    assert not list(Path("data/work", name).glob("*/checkpoint-*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {b: 1.0, c: [1]}", None),
        ("a: {b: 2, c: [1]}", "a.b (was 1, is 2)"),
        ("a: {b: 1, c: [1, 2]}", "a.c.1 (was missing, is 2)"),
        ("a: {b: 1}", "a.c.0 (was 1, is missing)"),
        ("a: {b: 1, c: [1], d: {}}", "changed while this command ran: a;"),
        ("b: 1", "the file has no 'a', it has b; add it, or correct the name; the file changed"),
        ("", "it has nothing; add it, or correct the name; the file changed while this command"),
        ("a: [", "not YAML"),
    ],
)
def test_what_changed_is_named(text, message, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text("a: {b: 1, c: [1]}")
    forget_sections()
    section(path, "a", dict[str, Any])
    path.write_text(text)
    if message is None:
        check_unchanged()
    else:
        with pytest.raises(ConfigError, match=re.escape(message)):
            check_unchanged()
    forget_sections()
