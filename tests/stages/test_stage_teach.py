"""teach@T: a reference, or a teacher trained here; what does not fit is refused before training."""

import json
import shutil
from pathlib import Path

from pipeline.provenance import read_json
from pipeline.teacher.source.reference import TeacherReference
from tests.cases import error_line, tiny_params, write_params

TEACHER = Path("data/teachers/main")


def change(project: Path, model: dict, fit: dict | None = None) -> None:
    params = tiny_params()
    params["teachers"]["main"].update(model=model, fit=fit)
    write_params(project, params)


def test_a_teacher_on_disk_is_referenced_and_not_copied(decant, project):
    model = shutil.move(TEACHER / "model", project / "elsewhere")
    before = TeacherReference.load(TEACHER)
    shutil.rmtree(TEACHER)
    change(project, {"path": str(model)})
    assert decant("teach", "main").exit_code == 0
    assert [path.name for path in TEACHER.iterdir()] == ["teacher.json"]
    assert TeacherReference.load(TEACHER).weights_sha256 == before.weights_sha256


def test_a_context_shorter_than_the_rows_is_refused(decant, project):
    scratch = tiny_params()["teachers"]["main"]["model"]["scratch"]
    change(project, {"scratch": {**scratch, "max_position_embeddings": 16}}, {"epochs": 1})
    result = decant("teach", "main")
    assert result.exit_code == 4
    assert "LlamaForCausalLM takes 16" in error_line(result)


def test_a_model_that_needs_code_of_its_own_is_refused(decant, project):
    folder = project / "foreign"
    shutil.copytree(TEACHER / "model", folder)
    config = read_json(folder / "config.json")
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    config.update(model_type="foreign", auto_map=auto_map)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('the code ran')")
    change(project, {"path": str(folder)})
    result = decant("teach", "main")
    assert result.exit_code == 2, result.output
    assert "trust_remote_code" in error_line(result)
    assert "the code ran" not in result.output


def test_an_unknown_key_of_the_architecture_is_named(decant, project):
    scratch = tiny_params()["teachers"]["main"]["model"]["scratch"]
    change(project, {"scratch": {**scratch, "hiden_size": 16}}, {"epochs": 1})
    result = decant("teach", "main")
    assert result.exit_code == 2
    assert "teachers.main.model.scratch.hiden_size" in error_line(result)


def test_a_teacher_that_is_nowhere_is_named(decant, project):
    change(project, {"path": "nowhere"})
    result = decant("teach", "main")
    assert result.exit_code == 2
    assert "teacher nowhere" in error_line(result)


def test_a_regression_is_taught_from_its_scores(decant, empty):
    rows = [{"text": f"some words {n}", "y": n / 10} for n in range(40)]
    (empty / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
    params = tiny_params()
    source = {"kind": "table", "files": "corpus.jsonl", "label": "y"}
    params["corpus"] = {"source": source, "task": "regression"}
    write_params(empty, params)
    for arguments in (("prepare",), ("tokenize", "main"), ("teach", "main")):
        result = decant(*arguments)
        assert result.exit_code == 0, result.output
    config = TeacherReference.load(TEACHER).config
    assert config["problem_type"] == "regression"
    assert list(config["id2label"].values()) == ["score"]
