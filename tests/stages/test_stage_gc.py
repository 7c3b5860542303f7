"""`decant gc`: what no revision names is listed, and removed only when asked for."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from pipeline.provenance import read_json, write_json
from pipeline.store.index import read_index
from pipeline.store.layout import Layout
from pipeline.store.lock import writer_lock
from tests.cases import error_line, tiny_params, write_params

OLD = "0123456789abcdef"


def store() -> Path:
    return next(path for path in Path("data/stores").iterdir() if path.name != OLD)


def git(*arguments: str) -> str:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("GIT")}
    who = ("-c", "user.name=t", "-c", "user.email=t@t")
    return subprocess.run(
        ["git", *who, *arguments], check=True, capture_output=True, text=True, env=kept
    ).stdout


def forget(place: str) -> str:
    """Let the workspace's manifests no longer name a signal, as a narrower capture does."""
    [path] = Path("data/manifests/main").glob(f"{place}.*.json")
    name = read_json(path)["signal"]
    path.unlink()
    return name


@pytest.fixture
def committed(project: Path) -> Path:
    """The project in git, with its manifests and without what DVC keeps."""
    Path(".gitignore").write_text("/data/*\n!/data/manifests\n")
    Path("dvc.yaml").write_text("stages: {capture: {outs: [data/manifests/main]}}\n")
    git("init", "-q", "-b", "main")
    git("add", "-A")
    git("commit", "-qm", "run")
    return project


def test_stores_without_a_manifest_are_listed_and_on_request_removed(decant, project):
    shutil.copytree(store(), store().with_name(OLD))
    listed = decant("gc")
    assert listed.exit_code == 0
    line = next(line for line in listed.output.splitlines() if line.startswith(OLD))
    assert "all of it" in line
    assert "no revision names it" in line
    assert "1 store, 0 signals" in listed.output
    assert "--yes removes them" in listed.output
    assert "not in git: searched only the files as they are now" in listed.output
    assert Path("data/stores", OLD).exists()
    assert decant("gc", "--yes").exit_code == 0
    assert not Path("data/stores", OLD).exists()
    assert "0 stores, 0 signals, 0 bytes" in decant("gc").output
    assert decant("capture", "main").exit_code == 0


def test_nothing_is_done_where_no_manifest_says_what_is_needed(decant, project):
    shutil.rmtree("data/manifests")
    result = decant("gc", "--yes")
    assert result.exit_code == 2
    assert "found no manifest" in error_line(result)
    assert store().exists()


def test_a_removed_signal_is_named_to_its_student_and_capture_brings_it_back(decant, project):
    layout = Layout(store())
    before = read_index(layout)["signals"]
    name = forget("hidden.2")
    listed = decant("gc")
    assert f"{store().name} {name} " in listed.output.replace("  ", " ")
    assert decant("gc", "--yes").exit_code == 0
    assert set(before) - set(read_index(layout)["signals"]) == {name}
    result = decant("train", "aligned")
    assert result.exit_code == 4
    assert f"no signal {name}; it has" in error_line(result)
    assert decant("capture", "main").exit_code == 0
    assert read_index(layout)["signals"] == before
    assert decant("train", "aligned").exit_code == 0


def test_what_another_branch_names_stays(decant, committed):
    name = forget("hidden.2")
    git("checkout", "-q", "-b", "narrow")
    git("commit", "-qam", "narrow")
    output = decant("gc").output
    assert "0 signals, 0 bytes" in output
    assert "searched 2 revisions" in output
    git("branch", "-qD", "main")
    assert f" {name} " in decant("gc").output


def test_revisions_that_keep_no_manifests_are_counted_and_stop_the_removal(decant, committed):
    git("rm", "-rq", "--cached", "data/manifests")
    git("commit", "-qm", "without")
    git("branch", "-q", "silent")
    git("reset", "-q", "--hard", "HEAD~1")
    git("checkout", "-q", "silent", "--", ".")
    name = forget("hidden.2")
    git("add", "-A")
    git("commit", "-q", "--amend", "-m", "narrow")
    listed = decant("gc")
    said = "1 revision has a capture stage but no manifests in git"
    assert f"{said}, so what is needed there is unknown (refs/heads/silent)" in listed.output
    result = decant("gc", "--yes")
    assert result.exit_code == 2
    assert said in error_line(result)
    assert name in read_index(Layout(store()))["signals"]
    assert decant("gc", "--yes", "--even-unknown").exit_code == 0
    assert name not in read_index(Layout(store()))["signals"]


def test_what_a_running_capture_holds_is_not_removed(decant, project):
    name = forget("hidden.2")
    with writer_lock(store() / "lock"):
        result = decant("gc", "--yes")
    assert result.exit_code == 0
    assert f"kept: process {os.getpid()} on " in result.output
    assert "0 stores, 0 signals, 0 bytes removed" in result.output
    assert name in read_index(Layout(store()))["signals"]


def test_an_experiment_asks_the_project_that_it_shares_stores_with(decant, project, monkeypatch):
    """DVC runs queued experiments elsewhere, and says where the project is."""
    monkeypatch.setenv("DVC_ROOT", str(project))
    forget("hidden.2")
    elsewhere = project / ".dvc/tmp/exps/tmp1"
    shutil.copytree("data/manifests", elsewhere / "data/manifests")
    name = forget("hidden.0")
    output = decant("gc").output
    assert "hidden/2" in output
    assert name not in output
    write_params(elsewhere, tiny_params())
    monkeypatch.chdir(elsewhere)
    assert decant("gc").output == output


def test_a_manifest_that_cannot_be_read_stops_it(decant, project):
    write_json(Path("data/manifests/main/store.json"), ["store"])
    result = decant("gc", "--yes")
    assert result.exit_code == 3
    assert "data/manifests/main/store.json: names no store" in error_line(result)
