"""train@S: from the store alone; another store or an altered one is refused before a step."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipeline.provenance import read_json, write_json
from tests.cases import error_line, tiny_params, write_params

SELECTED = Path("data/selected/aligned.json")
STUDENT = Path("data/students/aligned")


def store() -> Path:
    return Path("data/stores") / read_json(SELECTED)["store"]


def students() -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in STUDENT.iterdir()}


def test_the_teacher_may_be_gone(decant, project):
    before = (STUDENT / "model.safetensors").read_bytes()
    shutil.rmtree("data/teachers")
    shutil.rmtree("data/corpus")
    assert decant("train", "aligned").exit_code == 0
    assert (STUDENT / "model.safetensors").read_bytes() == before


def test_the_store_is_found_from_an_experiments_own_directory(decant, project, monkeypatch):
    elsewhere = project / "experiment"
    shutil.copytree(project / "data" / "selected", elsewhere / "data" / "selected")
    shutil.copyfile(project / "params.yaml", elsewhere / "params.yaml")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("DVC_ROOT", str(project))
    assert decant("train", "aligned").exit_code == 0
    assert (elsewhere / STUDENT).is_dir()
    assert not (elsewhere / "data" / "stores").exists()


def test_what_is_not_selected_names_the_command(decant, project):
    SELECTED.unlink()
    SELECTED.with_suffix(".agreement.json").unlink()
    for stage in ("train", "evaluate"):
        result = decant(stage, "aligned")
        assert result.exit_code == 3
        assert "missing; run `decant select aligned`" in error_line(result)


def test_features_other_than_those_selected_are_refused(decant, project):
    selected = read_json(SELECTED)
    signal = next(iter(selected["signals"]))
    selected["signals"][signal] = "0" * 64
    write_json(SELECTED, selected)
    before = students()
    result = decant("train", "aligned")
    assert result.exit_code == 4
    line = error_line(result)
    assert signal in line
    assert "expected 0000" in line
    assert students() == before


def test_a_store_that_is_gone_is_named(decant, project):
    shutil.rmtree("data/stores")
    result = decant("train", "aligned")
    assert result.exit_code == 3
    assert "run the capture stage" in error_line(result)


@pytest.mark.parametrize("kind", ["hidden", "tokens"])
def test_an_altered_byte_is_noticed_and_the_old_student_stays(decant, project, kind):
    files = [path for path in (store() / "features.zarr" / kind).rglob("c/**/*") if path.is_file()]
    shard = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    before = students()
    result = decant("train", "aligned")
    assert result.exit_code == 3, result.output
    assert str(shard.relative_to(store())) in error_line(result)
    assert students() == before


def test_a_student_without_parameters_is_named(decant, project):
    result = decant("train", "algned")
    assert result.exit_code == 2
    assert "students has no 'algned', it has aligned; add it" in error_line(result)


def test_a_student_of_fewer_ids_needs_logits_that_can_be_cut(decant, project):
    params = tiny_params()
    params["students"]["aligned"]["model"]["vocabulary"] = "corpus"
    write_params(Path(), params)
    result = decant("train", "aligned")
    assert result.exit_code == 4
    assert "head" in error_line(result)
    params["students"]["aligned"]["loss"] = {"labels": {"weight": 1.0}}
    write_params(Path(), params)
    assert decant("select", "aligned").exit_code == 0
    assert decant("train", "aligned").exit_code == 0
    pieces = read_json(STUDENT / "tokenizer.json")["model"]["vocab"]
    assert len(pieces) == read_json(STUDENT / "config.json")["vocab_size"]
    result = decant("evaluate", "aligned")
    assert result.exit_code == 0, result.output
    assert read_json(Path("data/metrics/students/aligned.json"))["test_perplexity"] > 1


def test_a_checkpoint_is_trained_by_adapters_alone(decant, project):
    shutil.copytree(STUDENT, "start")
    params = tiny_params()
    student = params["students"]["aligned"]
    student["model"] = {
        "checkpoint": "start",
        "lora": {"r": 2, "target_modules": ["q_proj"]},
    }
    student["loss"] = {"labels": {"weight": 1.0}}
    write_params(Path(), params)
    assert decant("select", "aligned").exit_code == 0
    result = decant("train", "aligned")
    assert result.exit_code == 0, result.output
    before, after = (load_file(path / "model.safetensors") for path in (Path("start"), STUDENT))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"model.layers.0.self_attn.q_proj.weight"}


@pytest.mark.parametrize("names", [(), ("aligned", "--student", "aligned")])
def test_one_student_is_named_once(decant, project, names):
    result = decant("train", *names)
    assert result.exit_code == 2
    assert "give STUDENT, or --student NAME" in error_line(result)


def test_a_student_may_be_named_by_an_option(decant, project):
    weights = (STUDENT / "model.safetensors").read_bytes()
    shutil.rmtree(STUDENT)
    assert decant("train", "--student", "aligned").exit_code == 0
    assert (STUDENT / "model.safetensors").read_bytes() == weights


def two_students(decant) -> None:
    """Add a student to the parameters, and select for it."""
    params = tiny_params()
    params["students"]["soft"]["train"]["batch_size"] = 8
    write_params(Path(), params)
    assert decant("select", "soft").exit_code == 0


def test_several_students_are_trained_side_by_side(decant, project):
    two_students(decant)
    before = (STUDENT / "model.safetensors").read_bytes()
    assert decant("train", "soft").exit_code == 0
    soft = Path("data/students/soft/model.safetensors")
    alone = soft.read_bytes()
    shutil.rmtree("data/students")
    result = decant("train", "--students", "soft, aligned")
    assert result.exit_code == 0, result.output
    assert (STUDENT / "model.safetensors").read_bytes() == before
    assert soft.read_bytes() == alone


@pytest.mark.parametrize("names", ["soft,,aligned", "aligned,aligned", ","])
def test_several_students_are_each_named_once(decant, project, names):
    result = decant("train", "--students", names)
    assert result.exit_code == 2
    assert "expected each name once" in error_line(result)


def test_several_students_train_in_one_process(decant, project, monkeypatch):
    two_students(decant)
    monkeypatch.setenv("DECANT_PROCESSES", "2")
    result = decant("train", "--students", "soft,aligned")
    assert result.exit_code == 2
    assert "runtime processes: found 2, expected 1 for --students" in error_line(result)


def test_weights_that_are_to_be_sharded_are_refused(decant, project, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    result = decant("train", "aligned")
    assert result.exit_code == 2
    assert "FSDP shards the weights, expected every process to hold them" in error_line(result)


@pytest.mark.slow
def test_two_processes_train_one_student(project):
    """Through the real command, whose second process says nothing."""
    environment = os.environ | {"DECANT_PROCESSES": "2"}
    command = [sys.executable, "-m", "stages.train", "aligned"]
    before = (STUDENT / "model.safetensors").read_bytes()
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("peak memory") == 1
    assert (STUDENT / "model.safetensors").read_bytes() != before


RELATED = {"loss": "relations", "weight": 0.1}


@pytest.mark.parametrize(
    ("capture", "student", "signals"),
    [
        (
            {"attention": {"layers": [2], "form": "below"}, "value": {"layers": [2]}},
            {"loss": {"attention": RELATED}},
            {"attention/2/below", "value/2/int8", "hidden/1/bfloat16"},
        ),
        (
            {"attention": {"layers": "all", "form": "map"}},
            {
                "align": {"layers": "emd"},
                "loss": {"feature": {"weight": 0.1}, "attention": {"weight": 0.1}},
            },
            {f"attention/{n}/map" for n in (1, 2)} | {f"hidden/{n}/bfloat16" for n in (0, 1, 2)},
        ),
        (
            {"logits": {"form": "sampled", "n": 8}},
            {"loss": {"output": {"weight": 1.0, "form": "sampled"}}},
            {"logits/sampled"},
        ),
    ],
    ids=["below", "map", "sampled"],
)
def test_a_student_trains_from_every_form(decant, project, capture, student, signals):
    params = tiny_params()
    params["teachers"]["main"]["capture"]["hidden"]["layers"] = [0, 1, 2]
    params["teachers"]["main"]["capture"] |= capture
    del params["students"]["aligned"]["loss"]
    params["students"]["aligned"] |= student
    write_params(Path(), params)
    for stage, name in (("check", ""), ("capture", "main"), ("select", "aligned")):
        result = decant(*filter(None, (stage, name)))
        assert result.exit_code == 0, result.output
    selected = read_json(Path("data/selected/aligned.json"))
    assert {name.rsplit("-", 1)[0] for name in selected["signals"]} == signals
    assert decant("train", "aligned").exit_code == 0
    terms = Path("data/metrics/curves/aligned.csv").read_text().splitlines()[0].split(",")
    assert set(student["loss"]) <= set(terms)
