"""Every command of every page runs, in the order a reader would type them."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks.fsync import main as syncing
from benchmarks.store import main as benchmark
from pipeline.provenance import read_json
from stages.cli import main as decant
from tests.docs.conftest import Project, write_classifier, write_reviews
from tests.docs.pages import ROOT, commands, fences

SCRIPTS = {
    "capturing": "dvc repro capture evaluate-teacher",
    "students": "git clone HERE students && cd students",
    "evaluating": "cp -r HERE/.dvc/cache .dvc/",
    "your own": "decant init reviews --preset sst2 --data CORPUS --teacher MODEL",
    "every day": "dvc repro",
    "stages": "decant --help",
}
"""The fences that the tests below run, by their first line."""
ELSEWHERE = {
    "make install": "the recipe is checked below; this test runs in what it made",
    "make repro": "the recipe is checked below: dvc repro, which runs here",
    "make test": "the recipe is checked below: what you are looking at",
    "make check": "the recipe is checked below",
    "make faults": "the recipe is checked below: what tests/faults does, more often",
    "make families": "the recipe is checked below: what tests/families does, of all families",
    "make style": "the recipe is checked below",
    "make bench": "tests/benchmarks/test_train.py",
    "dvc repro select@labels-only select@soft-labels select@aligned": "tests/e2e/test_dvc.py",
    "decant train --students labels-only,soft-labels,aligned": "tests/e2e/test_dvc.py",
    "dvc commit -f train@labels-only train@soft-labels train@aligned": "tests/e2e/test_dvc.py",
    "dvc repro": "every test of tests/e2e",
    "dvc exp run --queue -S students.aligned.train.learning_rate=0.002,0.004": "DVC's own",
    "dvc queue start -j 2": "DVC's own",
    "DECANT_PROCESSES=2 decant train aligned": "tests/stages/test_stage_train.py",
    "torchrun --standalone --nproc_per_node 2 -m stages.train aligned": "student/test_ranks.py",
    "python -m benchmarks.store": "test_the_benchmark_gives_a_table_and_a_json_line",
    "python -m benchmarks.seeds --seeds 3": "test_the_seeds_of_one_student",
    "python -m benchmarks.fsync": "test_the_cost_of_syncing_gives_a_table_and_a_json_line",
    "python -m benchmarks.plain_zarr": "tests/faults/test_plain_zarr.py",
    "python -m benchmarks.forms --bytes": "tests/benchmarks/test_forms.py",
    "python -m benchmarks.forms": "tests/benchmarks/test_forms.py",
    "python -m benchmarks.forms --table data/work/forms/runs": "tests/benchmarks/test_forms.py",
}
"""Commands that no script runs as they stand, and what stands for them."""
ON_A_CLUSTER = ("openssl req ", "dask scheduler ", "CUDA_VISIBLE_DEVICES=0 dask worker ")
"""How those begin that tests/teacher/test_running_cluster.py runs on loopback."""


def script(name: str, **places: Path) -> str:
    (found,) = [fence for fence in fences("sh") if commands(fence)[0] == SCRIPTS[name]]
    text = "\n".join(commands(found))
    for place, path in places.items():
        text = re.sub(rf"\b{place}\b", str(path), text)
    return text


def test_every_command_is_run_or_accounted_for():
    unknown = [
        command
        for fence in fences("sh", "bash", "shell", "console")
        if commands(fence)[0] not in SCRIPTS.values()
        for command in commands(fence)
        if command not in ELSEWHERE and not command.startswith(ON_A_CLUSTER)
    ]
    assert unknown == []
    # None of ours hides in an indented block, where it would not be found.
    indented = [
        line
        for page in {fence.page for fence in fences("sh")}
        for line in (ROOT / page).read_text().splitlines()
        if re.match(r" {4}(dvc|decant|make|git|python) ", line)
    ]
    assert indented == []


@pytest.mark.parametrize(
    "target", ["install", "repro", "test", "faults", "families", "check", "style", "bench"]
)
def test_a_make_target_has_a_recipe(target):
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_benchmark_gives_a_table_and_a_json_line():
    result = CliRunner().invoke(benchmark, ["--tokens=600", "--layers=2", "--width=32"])
    assert result.exit_code == 0, result.output
    *table, line = result.stdout.strip().splitlines()
    assert any("teacher and capture" in row for row in table)
    assert '"benchmark": "store"' in line
    assert '"epoch_tokens_per_second"' in line


def test_the_cost_of_syncing_gives_a_table_and_a_json_line(tmp_path):
    options = ["--segments=3", "--segment-tokens=512", "--width=16", "--repetitions=2"]
    result = CliRunner().invoke(syncing, [*options, f"--directory={tmp_path}"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout.strip().splitlines()[-1])["benchmark"] == "fsync"


@pytest.fixture(scope="module")
def elsewhere(project) -> Project:
    """The students' machine: a clone and a copy of the store, then what evaluating needs."""
    project.shell(script("capturing"))
    assert not (project.root / "data/students").exists()
    place = project.root.parent / "elsewhere"
    place.mkdir()
    Project(place).shell(script("students", HERE=project.root))
    there = Project(place / "students")
    assert (there.root / "data/students/aligned/config.json").exists()
    assert not (there.root / "data/teachers").exists()
    assert not (there.root / "data/corpus/tokens").exists()
    told = there.shell(script("evaluating", HERE=project.root))
    assert "capture main" in told
    for stage in ("prepare", "tokenize", "teach", "train", "evaluate-teacher"):
        assert f"> decant {stage}" not in told, stage
    assert set(read_json(there.root / "data/reports/metrics.json")["students"]) == {"aligned"}
    return there


@pytest.mark.e2e
def test_a_project_of_your_own(tmp_path):
    corpus, model = tmp_path / "corpus", tmp_path / "model"
    write_reviews(corpus)
    write_classifier(model)
    place = Project(tmp_path)
    wanted = script("your own", CORPUS=corpus, MODEL=model)
    # What anybody waits for longer: the preset's epochs.
    quick = "sed -i -E 's/epochs: [0-9]+/epochs: 1/' reviews/params.yaml"
    place.shell(wanted.replace("cd reviews", f"{quick}\ncd reviews"))
    metrics = read_json(tmp_path / "reviews/data/reports/metrics.json")
    assert set(metrics["students"]) == {"labels-only", "soft-labels", "aligned"}
    assert metrics["teacher"]["score"] == "accuracy"
    assert "test_accuracy" in metrics["students"]["aligned"]


@pytest.mark.e2e
def test_every_day(elsewhere):
    told = elsewhere.shell(script("every day"))
    # The experiment trains; all before it finds its work done.
    assert told.count("> decant train aligned") == 1
    assert "attention/4" in told
    assert "0 stores" in told
    assert "aligned" in elsewhere.shell("dvc exp show --only-changed")


@pytest.mark.e2e
def test_the_seeds_of_one_student(elsewhere):
    command = "python -m benchmarks.seeds --seeds 2 --student aligned"
    (line,) = re.findall(r"^\{.*\}$", elsewhere.shell(command), flags=re.MULTILINE)
    first, second = json.loads(line)["aligned"]
    assert first != second
    # Finished seeds are read back, not trained again.
    again = elsewhere.shell(command)
    assert line in again
    assert "train aligned" not in again


@pytest.mark.e2e
def test_every_stage_is_a_command(elsewhere, monkeypatch):
    monkeypatch.chdir(elsewhere.root)
    runner = CliRunner()
    for line in script("stages").splitlines():
        name, *arguments = line.split()
        assert name == "decant"
        result = runner.invoke(decant, arguments)
        assert result.exit_code == 0, f"{line}\n{result.output}"


@pytest.mark.e2e
def test_plain_zarr_reads_what_the_reader_reads(elsewhere, monkeypatch):
    monkeypatch.chdir(elsewhere.root)
    plain, checked = [fence for fence in fences("python") if fence.page == "docs/store.md"]
    found: dict = {}
    exec(plain.text, found)
    exec(checked.text, found)
    assert len(found["first"]) == found["length"] > 0
    assert np.array_equal(found["hidden"], found["first"])


def test_every_snippet_of_python_is_run():
    assert {fence.page for fence in fences("python")} == {"docs/adding.md", "docs/store.md"}
