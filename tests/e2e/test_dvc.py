"""What a user does with DVC, on a project in miniature: each command runs what it must, no more."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.provenance import read_json
from stages.parameters import read_yaml
from tests.cases import tiny_params, write_params, write_project

pytestmark = pytest.mark.e2e
ALWAYS = ["capture@main", "code"]
CORPUS = "data/raw/corpus.txt"
PATIENCE_SECONDS = 300


def environment(folder: Path) -> dict[str, str]:
    """Let `decant` be this environment's, with the code of the project."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("DVC", "GIT"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    return kept | {"PATH": path, "PYTHONPATH": str(folder)}


def run(folder: Path, *command: str) -> str:
    """Run a command in the project; return what it printed."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def stages_in(output: str) -> list[str]:
    return sorted(re.findall(r"Running stage '([^']+)'", output))


def manifests(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (folder / "data/manifests/main").iterdir()}


def trained(folder: Path, names: Sequence[str]) -> list[bytes]:
    """Read weights and curves of students."""
    files = ("data/students/{}/model.safetensors", "data/metrics/curves/{}.csv")
    return [(folder / file.format(name)).read_bytes() for name in names for file in files]


def commit(folder: Path, message: str) -> None:
    run(folder, "git", "add", "-A")
    run(folder, "git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", message)


def kill_when(folder: Path, pattern: str) -> None:
    """Start `dvc repro` and kill it, with its stage, when a file of this pattern is there."""
    process = subprocess.Popen(
        ["dvc", "repro"],
        cwd=folder,
        env=environment(folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + PATIENCE_SECONDS
    while process.poll() is None and not any(folder.glob(pattern)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert process.poll() is None, f"the run ended before it wrote {pattern}"
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose first run was killed in the middle of a student, and then went on."""
    folder = tmp_path_factory.mktemp("decant")
    write_project(folder)
    params = tiny_params()
    # Where DVC looks for changes of the corpus.
    (folder / "corpus.txt").rename(folder / CORPUS)
    params["corpus"]["source"]["files"] = CORPUS
    for student in params["students"].values():
        student["train"].update(epochs=4, save_every=4)
    write_params(folder, params)
    run(folder, "git", "init", "-q")
    commit(folder, "start")
    kill_when(folder, "data/work/train/*/checkpoint-*/complete.json")
    output = run(folder, "dvc", "repro")
    assert "teach@main" not in stages_in(output)
    assert re.search(r"resuming from .*checkpoint-\d+", output)
    commit(folder, "run")
    return folder


def test_the_first_run_leaves_a_report_and_scores(project):
    metrics = read_json(project / "data/reports/metrics.json")
    assert set(metrics["students"]) == {"soft", "aligned"}
    assert (project / "data/reports/index.html").is_file()
    assert not list((project / "data/work").glob("*/*/checkpoint-*"))
    assert run(project, "git", "status", "--porcelain") == ""


def test_a_second_run_trains_nothing(project):
    assert stages_in(run(project, "dvc", "repro")) == ALWAYS


def test_what_was_changed_is_what_runs_again(project):
    """By status alone: it says which stages' own inputs are others now, and runs nothing."""
    corpus, params = project / CORPUS, project / "params.yaml"
    text, parameters = corpus.read_bytes(), params.read_bytes()

    def changed() -> set[str]:
        return set(json.loads(run(project, "dvc", "status", "--json"))) - set(ALWAYS)

    assert changed() == set()
    lines = text.splitlines(keepends=True)
    for other in (lines[1:], [*lines[1:], lines[0]], [b"other words " + lines[0], *lines[1:]]):
        corpus.write_bytes(b"".join(other))
        assert changed() == {"prepare"}
    corpus.write_bytes(text)
    for change, stages in (
        (lambda p: p["teachers"]["main"]["tokens"].update(max_length=16), "tokenize@main"),
        (lambda p: p["teachers"]["main"]["fit"].update(learning_rate=0.01), "teach@main"),
        (lambda p: p["students"]["soft"]["train"].update(learning_rate=0.01), "train@soft"),
    ):
        values = read_yaml(params)
        change(values)
        write_params(project, values)
        found = changed()
        assert stages in found
        others = {"prepare", "tokenize@main", "teach@main", "train@soft", "train@aligned"}
        assert found & others == {stages}
        params.write_bytes(parameters)
    assert changed() == set()


def test_an_edit_of_the_code_concerns_the_stages_that_run_it(project):
    source = project / "pipeline/evaluate/perplexity.py"
    before = source.read_bytes()
    source.write_bytes(before + b"# edited\n")
    assert stages_in(run(project, "dvc", "repro", "code")) == ["code"]
    changed = set(json.loads(run(project, "dvc", "status", "--json"))) - set(ALWAYS)
    assert changed == {"evaluate-teacher@main", "evaluate@aligned", "evaluate@soft"}
    source.write_bytes(before)
    assert stages_in(run(project, "dvc", "repro", "evaluate@soft")) == ALWAYS


def test_a_lost_store_is_captured_again_and_nothing_else(project):
    before = manifests(project)
    shutil.rmtree(project / "data/stores")
    assert stages_in(run(project, "dvc", "repro")) == ALWAYS
    assert manifests(project) == before
    assert list((project / "data/stores").glob("*/manifest.json"))


def test_an_experiment_runs_the_student_it_changes_and_captures_the_layer_it_adds(project):
    before = manifests(project)
    output = run(
        project,
        *("dvc", "exp", "run", "-n", "wider"),
        *("-S", "students.soft.loss.output.weight=0.5"),
        *("-S", "teachers.main.capture.hidden.layers=[0,1,2]"),
    )
    assert stages_in(output) == [
        "capture@main",
        "check",
        "code",
        "evaluate@soft",
        "report",
        "select@aligned",
        "select@soft",
        "train@soft",
    ]
    after = manifests(project)
    assert before.items() <= after.items()
    assert [name.split("-")[0] for name in after.keys() - before.keys()] == ["hidden.1.bfloat16"]
    assert read_yaml(project / "params.yaml")["students"]["soft"]["loss"]["output"]["weight"] == 0.5
    difference = run(project, "dvc", "metrics", "diff")
    assert re.search(r"students/soft\.json +test_perplexity", difference)
    assert "students/aligned" not in difference
    assert "students.soft.loss.output.weight" in run(project, "dvc", "params", "diff")
    assert "wider" in run(project, "dvc", "exp", "show", "--csv")


def test_students_trained_together_are_done_for_dvc_too(project):
    """As docs/training.md has it: only what comes after them is left to do."""
    names = ("soft", "aligned")
    values = read_yaml(project / "params.yaml")
    for name in names:
        values["students"][name]["train"].update(learning_rate=0.002, epochs=1)
    write_params(project, values)
    before = trained(project, names)
    run(project, "dvc", "repro", "--single-item", *(f"select@{name}" for name in names))
    run(project, "decant", "train", "--students", ",".join(names))
    together = trained(project, names)
    assert not set(together) & set(before)
    run(project, "dvc", "commit", "-f", *(f"train@{name}" for name in names))
    left = set(json.loads(run(project, "dvc", "status", "--json")))
    assert left == {*ALWAYS, "check", "evaluate@aligned", "evaluate@soft", "report"}
    assert not list((project / "data/work/train").glob("*/*"))


def test_parameters_that_are_edited_under_a_running_stage_are_not_recorded(project):
    """The student would be of the old values, and the lock file would name the new ones."""
    values = read_yaml(project / "params.yaml")
    train = values["students"]["soft"]["train"]
    train["epochs"] = 60
    write_params(project, values)
    run(project, "dvc", "repro", "--single-item", "select@soft")
    before = (project / "dvc.lock").read_bytes()
    command = ["dvc", "repro", "--single-item", "train@soft"]
    with subprocess.Popen(
        command,
        cwd=project,
        env=environment(project),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
    ) as process:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while process.poll() is None and not any(project.glob("data/work/train/soft-*")):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        train["epochs"] = 2
        write_params(project, values)
        _, said = process.communicate()
    assert process.returncode != 0
    assert b"students.soft.train.epochs (was 60, is 2)" in said
    assert (project / "dvc.lock").read_bytes() == before
    assert "train@soft" in json.loads(run(project, "dvc", "status", "--json"))
    output = run(project, "dvc", "repro", "--single-item", "train@soft")
    assert stages_in(output) == ["train@soft"]
