"""`kill -9` of the real stage one: readers see whole signals alone, and what was durable stays."""

import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from tests.faults.forked import NEVER, Child, decant, start, until_operation
from tests.faults.small_project import CAPTURE, SmallProject, differ, small_project

LOG = "operations.txt"
FEW: dict[str, Any] = {key: value for key, value in CAPTURE.items() if key != "attention"}
pytestmark = pytest.mark.usefixtures("unsynced")


DEATHS = {"number": (5, 200), "added_number": (1, 20)}
"""How many, in `make test` and in `make faults`."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make each death of many a test of its own; its number is its seed."""
    for name, (few, many) in DEATHS.items():
        if name in metafunc.fixturenames:
            is_many = metafunc.config.getoption("--faults") == "many"
            metafunc.parametrize(name, range(many if is_many else few))


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> SmallProject:
    """A project in which nothing is captured."""
    return small_project(tmp_path_factory.mktemp("bare") / "project")


def capture_until(project: SmallProject, operation: int, stderr: Path) -> Child:
    """Start the real stage one, to die before its n-th operation that changes a file."""
    log = project.root / LOG
    stage = ("capture", "main")
    return start(until_operation, operation, log, decant, *stage, cwd=project.root, stderr=stderr)


class Undisturbed:
    """A capture that nobody disturbs: what it leaves, how long it takes, how often it writes."""

    def __init__(self, start_from: SmallProject, root: Path, capture: dict[str, Any]) -> None:
        self.project = start_from.copy(root / "undisturbed")
        self.project.parameters(capture)
        begun = time.monotonic()
        child = capture_until(self.project, NEVER, root / "stderr")
        assert child.wait() == 0, child.errors()
        self.seconds = time.monotonic() - begun
        self.operations = len((self.project.root / LOG).read_text().splitlines())
        self.digests = self.project.digests()
        self.manifests = self.project.manifests()
        self.values = self.project.whole


@pytest.fixture(scope="module")
def undisturbed(bare, tmp_path_factory) -> Undisturbed:
    return Undisturbed(bare, tmp_path_factory.mktemp("undisturbed"), CAPTURE)


@pytest.fixture(scope="module")
def added(bare, tmp_path_factory) -> tuple[SmallProject, Undisturbed]:
    """A whole store of some signals, and the undisturbed capture of one more into it."""
    root = tmp_path_factory.mktemp("added")
    old = Undisturbed(bare, root, FEW).project
    (root / "more").mkdir()
    return old, Undisturbed(old, root / "more", CAPTURE)


def moment(number: int, draw: random.Random, expected: Undisturbed) -> tuple[float, int]:
    """Return when the n-th child is to die: every other at an operation, else after a time."""
    if number % 2:
        return draw.uniform(0.0, expected.seconds), NEVER
    return 60.0, draw.randint(1, expected.operations)


def capture_killed(project: SmallProject, when: tuple[float, int], stderr: Path) -> Child:
    """Run stage one and kill it at a moment; it may have ended before."""
    seconds, operation = when
    child = capture_until(project, operation, stderr)
    end = time.monotonic() + seconds
    while child.is_running() and time.monotonic() < end:
        time.sleep(0.001)
    child.kill()
    return child


def check(project: SmallProject, expected: Undisturbed, must_see: set[str], ledger: Any) -> None:
    """After a kill readers see what is whole, at least the old signals, and right values only."""
    found = project.values()
    wrong = differ(found, expected.values)
    lost = not must_see <= found.keys()
    ledger.record("killed capture: read", detected=not wrong and not lost, wrong=wrong, lost=lost)
    assert not wrong
    assert not lost


def check_resumed(
    project: SmallProject, expected: Undisturbed, before: dict[Path, int], ledger: Any, fault: str
) -> None:
    """A resumed capture ends as if undisturbed and computed nothing that was durable again."""
    found = project.digests()
    after = project.receipts()
    wrong = any(found[name] != expected.digests.get(name) for name in found)
    lost = any(after.get(path) != written for path, written in before.items())
    whole = found == expected.digests and project.manifests() == expected.manifests
    ledger.record(fault, detected=whole and not lost, wrong=wrong, lost=lost)
    assert found == expected.digests
    assert project.manifests() == expected.manifests
    assert {path: after.get(path) for path in before} == before
    assert not differ(project.values(), expected.values)
    assert project.unfinished() == []


def test_a_killed_capture_loses_nothing_and_ends_as_if_undisturbed(
    number, bare, undisturbed, tmp_path, ledger
):
    draw = random.Random(number)
    project, errors = bare.copy(tmp_path / "project"), tmp_path / "stderr"
    child = capture_killed(project, moment(number, draw, undisturbed), errors)
    assert child.code in (0, -signal.SIGKILL), child.errors()
    check(project, undisturbed, set(), ledger)
    before = project.receipts()
    while draw.random() < 0.4:
        capture_killed(project, moment(number, draw, undisturbed), errors)
        check(project, undisturbed, set(), ledger)
        after = project.receipts()
        assert {path: after.get(path) for path in before} == before
        before = after
    child = start(decant, "capture", "main", cwd=project.root, stderr=errors)
    assert child.wait() == 0, child.errors()
    check_resumed(project, undisturbed, before, ledger, "killed capture: resumed")


def test_signals_that_are_whole_stay_readable_while_others_are_added_and_killed(
    added_number, added, tmp_path, ledger
):
    old, expected = added
    draw = random.Random(added_number)
    names = set(old.digests())
    assert names < expected.digests.keys()
    project, errors = old.copy(tmp_path / "project"), tmp_path / "stderr"
    project.parameters(CAPTURE)
    before = project.receipts()
    child = capture_until(project, draw.randint(1, expected.operations), errors)
    while child.is_running():
        check(project, expected, names, ledger)
    check(project, expected, names, ledger)
    child = start(decant, "capture", "main", cwd=project.root, stderr=errors)
    while child.is_running():
        check(project, expected, names, ledger)
    assert child.wait() == 0, child.errors()
    check_resumed(project, expected, before, ledger, "killed capture: added signal")
