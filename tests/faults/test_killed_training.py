"""`kill -9` of the real stage two: it goes on from the last whole checkpoint, to the same bits.

Also where it is worst: between the files of a checkpoint, before its marker, while old ones are
removed, within the export, before the curve, and while the checkpoints are removed at the end.
"""

import random
import signal
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from pipeline.training.checkpoints import MARKER, last_complete_checkpoint
from tests.faults.forked import NEVER, Child, decant, start, until_operation
from tests.faults.small_project import STUDENT, SmallProject, small_project

LOG = "operations.txt"
EARLIER = {"config.json": b"{}", "model.safetensors": b"an earlier student"}
PHASED: dict[str, Any] = {
    **STUDENT,
    "loss": {**STUDENT["loss"], "phases": {"features": 0.5}, "balance": "gradient_norm"},
}
STUDENTS = {"plain": STUDENT, "two phases, balanced": PHASED}


def student_files(project: SmallProject) -> dict[str, bytes]:
    """Every file of the student by name; empty if there is no student."""
    paths = project.student.glob("*")
    return {path.name: path.read_bytes() for path in paths}


def train_until(project: SmallProject, operation: int, stderr: Path) -> Child:
    """Start the real stage two, to die before its n-th operation that changes a file."""
    log = project.root / LOG
    stage = ("train", "small")
    return start(until_operation, operation, log, decant, *stage, cwd=project.root, stderr=stderr)


def place_earlier(project: SmallProject) -> None:
    """Put a student there that the run is going to replace."""
    project.student.mkdir(parents=True)
    for name, content in EARLIER.items():
        (project.student / name).write_bytes(content)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make each death of many a test of its own; a number is its seed."""
    if "number" in metafunc.fixturenames:
        many = metafunc.config.getoption("--faults") == "many"
        metafunc.parametrize("number", range(100 if many else 1))


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> SmallProject:
    """A project whose store is whole."""
    root = tmp_path_factory.mktemp("captured")
    project = small_project(root / "project")
    child = start(decant, "capture", "main", cwd=project.root, stderr=root / "stderr")
    assert child.wait() == 0, child.errors()
    return project


class Undisturbed:
    """A project ready for a kind of student, and a training in a copy that nobody disturbs."""

    def __init__(self, captured: SmallProject, root: Path, student: dict[str, Any]) -> None:
        self.ready = captured.copy(root / "ready")
        self.ready.parameters(student=student)
        child = start(decant, "select", "small", cwd=self.ready.root, stderr=root / "stderr")
        assert child.wait() == 0, child.errors()
        place_earlier(self.ready)
        done = self.ready.copy(root / "undisturbed")
        begun = time.monotonic()
        child = train_until(done, NEVER, root / "stderr")
        assert child.wait() == 0, child.errors()
        self.seconds = time.monotonic() - begun
        self.operations = (done.root / LOG).read_text().splitlines()
        self.student = student_files(done)
        self.curve = done.curve.read_bytes()


@pytest.fixture(scope="module")
def undisturbed(captured, tmp_path_factory) -> Callable[[str], Undisturbed]:
    """Return the undisturbed training of a kind of student; made when first asked for."""

    @cache
    def get(kind: str) -> Undisturbed:
        return Undisturbed(captured, tmp_path_factory.mktemp("undisturbed"), STUDENTS[kind])

    return get


def nth(operations: list[str], *words: str) -> int:
    """Return the number of the first operation in whose line every word stands."""
    return next(n for n, line in enumerate(operations, 1) if all(word in line for word in words))


WORST = {
    "within a checkpoint": ("open", "checkpoint-4/trainer_state.json"),
    "before its marker": ("open", "checkpoint-4/", MARKER),
    "between two students": ("os.rename", ".small.writing"),
    "before the curve": ("open", "small.csv"),
    "removing an old one": ("os.rmdir", "checkpoint-2"),
    "within the export": ("open", ".small.writing/", "distillation.json"),
    "removing all at the end": ("shutil.rmtree", "data/work/train/small-"),
}
"""Words of the operation before which to die; the first four every day."""


def check_killed(project: SmallProject, expected: Undisturbed, child: Child, ledger: Any) -> None:
    """After a kill there is the earlier student, the new one or none: never a part of one."""
    assert child.code in (0, -signal.SIGKILL), child.errors()
    found = student_files(project)
    wrong = found not in ({}, EARLIER, expected.student)
    ledger.record("killed training: student", detected=not wrong, wrong=wrong)
    assert not wrong, sorted(found)


def finish(
    project: SmallProject, expected: Undisturbed, stderr: Path, ledger: Any, fault: str
) -> None:
    """The same command again: from the last whole checkpoint, to the undisturbed run's bits."""
    (work,) = list(project.data.glob("work/train/small-*[!.lock]")) or [project.data / "none"]
    last = last_complete_checkpoint(work)
    whole = last is not None and (Path(last) / "trainer_state.json").exists()
    stderr.unlink(missing_ok=True)
    child = start(decant, "train", "small", cwd=project.root, stderr=stderr)
    child.wait()
    text = child.errors()
    resumed = [line for line in text.splitlines() if "resuming from" in line]
    at_last = [Path(line.rsplit(maxsplit=1)[1]).name for line in resumed]
    lost = at_last != ([Path(last).name] if last and whole else [])
    same = student_files(project) == expected.student and _curve(project) == expected.curve
    ledger.record(fault, detected=child.code == 0 and same, wrong=not same, lost=lost)
    assert child.code == 0, text
    assert not lost, text
    assert student_files(project) == expected.student
    assert project.curve.read_bytes() == expected.curve
    assert project.unfinished() == []


def _curve(project: SmallProject) -> bytes:
    return project.curve.read_bytes() if project.curve.exists() else b""


@pytest.mark.usefixtures("unsynced")
def test_death_at_the_worst_places_changes_no_bit(undisturbed, tmp_path, times, ledger):
    expected = undisturbed("plain")
    for place in list(WORST)[: times(4, len(WORST))]:
        project = expected.ready.copy(tmp_path / place)
        errors = tmp_path / f"{place}.stderr"
        child = train_until(project, nth(expected.operations, *WORST[place]), errors)
        assert child.wait() == -signal.SIGKILL, child.errors()
        check_killed(project, expected, child, ledger)
        finish(project, expected, errors, ledger, f"killed training: {place}")


@pytest.mark.usefixtures("unsynced")
def test_death_at_any_moment_changes_no_bit(number, undisturbed, tmp_path, ledger):
    draw = random.Random(number)
    expected = undisturbed(list(STUDENTS)[number % len(STUDENTS)])
    project = expected.ready.copy(tmp_path / "project")
    is_again = True
    while is_again:
        at = draw.randint(1, len(expected.operations)) if draw.random() < 0.5 else NEVER
        child = train_until(project, at, tmp_path / "stderr")
        end = time.monotonic() + draw.uniform(0, expected.seconds)
        while child.is_running() and (at != NEVER or time.monotonic() < end):
            time.sleep(0.001)
        child.kill()
        check_killed(project, expected, child, ledger)
        is_again = child.code != 0 and draw.random() < 0.3
    finish(project, expected, tmp_path / "stderr", ledger, "killed training: any moment")


def test_the_marker_is_the_last_of_a_checkpoints_files(undisturbed):
    """What the tests above rely on, and a crash of the machine too: every file is synced first."""
    lines = undisturbed("plain").operations
    written = [line for line in lines if line.startswith("open") and "/checkpoint-4/" in line]
    assert MARKER in written[-1]
    assert sum(MARKER in line for line in written) == 1
