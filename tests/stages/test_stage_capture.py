"""capture@T: what the store lacks and nothing else; what is refused loses nothing."""

import multiprocessing
import shutil
import subprocess
import sys
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from pipeline.provenance import read_json
from pipeline.store.layout import Layout
from pipeline.store.lock import writer_lock
from tests.cases import LAYERS, ROOT, error_line, tiny_params, write_params

MANIFESTS = Path("data/manifests/main")
STORES = Path("data/stores")


def store() -> Path:
    return STORES / read_json(MANIFESTS / "store.json")["store"]


def manifests() -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in MANIFESTS.iterdir()}


def change(project: Path, **capture: object) -> None:
    params = tiny_params()
    params["teachers"]["main"]["capture"].update(capture)
    write_params(project, params)


def test_a_whole_store_is_left_alone(decant, project):
    files = {path: path.stat().st_mtime_ns for path in store().rglob("*")}
    before = {path: path.stat().st_mtime_ns for path in MANIFESTS.iterdir()}
    assert decant("capture", "main").exit_code == 0
    assert {path: path.stat().st_mtime_ns for path in store().rglob("*")} == files
    assert {path: path.stat().st_mtime_ns for path in MANIFESTS.iterdir()} == before


def test_a_lost_store_is_captured_again_with_equal_digests(decant, project):
    before = manifests()
    shutil.rmtree(STORES)
    assert decant("capture", "main").exit_code == 0
    assert manifests() == before


def test_a_layer_that_is_no_longer_asked_for_leaves_the_manifests_but_not_the_store(
    decant, project
):
    change(project, hidden={"layers": [2], "form": "bfloat16"})
    before = {path for path in store().rglob("*") if path.is_file()}
    assert decant("capture", "main").exit_code == 0
    assert not list(MANIFESTS.glob("hidden.0.*"))
    assert list(MANIFESTS.glob("hidden.2.*"))
    assert before <= {path for path in store().rglob("*") if path.is_file()}


def test_a_layer_the_teacher_does_not_have_is_refused(decant, project):
    before = manifests()
    change(project, hidden={"layers": [LAYERS + 1], "form": "bfloat16"})
    result = decant("capture", "main")
    assert result.exit_code == 2
    assert f"layer {LAYERS + 1} asked for, the teacher has 0 to {LAYERS}" in error_line(result)
    assert manifests() == before


def hold(lock: Path, held: Event, done: Event) -> None:
    with writer_lock(lock):
        held.set()
        done.wait(60)


def test_a_store_that_another_process_writes_is_not_waited_for_when_told(decant, project):
    change(project, hidden={"layers": [1], "form": "bfloat16"})
    context = multiprocessing.get_context("spawn")
    held, done = context.Event(), context.Event()
    other = context.Process(target=hold, args=(Layout(store()).lock, held, done))
    other.start()
    try:
        assert held.wait(60)
        result = decant("capture", "main", "--no-wait")
    finally:
        done.set()
        other.join()
    assert result.exit_code == 5
    assert f"process {other.pid} on" in error_line(result)


@pytest.mark.slow
def test_no_space_left_is_one_line_and_what_was_written_counts(project):
    """A limit on the size of a file stands in for a full disk: the write fails, not the start."""
    before = manifests()
    shutil.rmtree(STORES)
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))\n"
        "from stages.capture import capture\n"
        "capture(['main'])"
    )

    def run(limit: int) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", code, str(limit)],
            # The limit would cut byte code short as well, and Python trusts what it finds.
            env={"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )

    full = run(20_000)
    assert full.returncode == 5, full.stderr
    assert "Traceback" not in full.stderr
    assert "free" in full.stderr.splitlines()[-1]
    enough = run(2**30)
    assert enough.returncode == 0, enough.stderr
    assert manifests() == before
