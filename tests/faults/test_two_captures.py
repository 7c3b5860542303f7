"""Two captures into one store: one writes, the other waits and says for whom, or does not wait."""

import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from pipeline.store.reader import StoreReader
from pipeline.teacher.capture import capture as module
from pipeline.teacher.capture.segments import SegmentCapture
from tests.faults.forked import PATIENCE_SECONDS, Child, decant, start
from tests.faults.small_project import SEGMENTS, SmallProject, differ, small_project

pytestmark = pytest.mark.usefixtures("unsynced")
OLD: dict[str, Any] = {"hidden": {"layers": [1], "form": "bfloat16"}, **SEGMENTS}
LAST = 2
"""The segment before which a capture that is held waits: some are there, some are not."""


def capture_held(reached: Path, go: Path) -> None:
    """Capture, but wait before a segment until told to go on."""
    plain = SegmentCapture.launch

    def held(self: SegmentCapture, number: int, *rest: Any) -> Any:
        if number == LAST:
            reached.touch()
            while not go.exists():
                time.sleep(0.005)
        return plain(self, number, *rest)

    SegmentCapture.launch = held
    decant("capture", "main")


def capture_without_teacher() -> None:
    """Capture where loading a teacher would fail."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the teacher was loaded")

    module.load_teacher = refuse
    decant("capture", "main")


def until(found: Any, what: str) -> None:
    """Wait until a condition holds."""
    end = time.monotonic() + PATIENCE_SECONDS
    while not found():
        assert time.monotonic() < end, what
        time.sleep(0.005)


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> SmallProject:
    """A project with one whole signal."""
    root = tmp_path_factory.mktemp("old")
    project = small_project(root / "project")
    project.parameters(OLD)
    child = start(decant, "capture", "main", cwd=project.root, stderr=root / "stderr")
    assert child.wait() == 0, child.errors()
    return project


@pytest.fixture(scope="module")
def whole(old, tmp_path_factory) -> SmallProject:
    """The same after an undisturbed capture of more signals."""
    root = tmp_path_factory.mktemp("whole")
    project = old.copy(root / "project")
    project.parameters()
    child = start(decant, "capture", "main", cwd=project.root, stderr=root / "stderr")
    assert child.wait() == 0, child.errors()
    return project


@pytest.fixture
def project(old, tmp_path) -> SmallProject:
    found = old.copy(tmp_path / "project")
    found.parameters()
    return found


@pytest.fixture
def go(tmp_path) -> Path:
    return tmp_path / "go"


@pytest.fixture
def holder(project, go, tmp_path):
    """A capture that is under way and waits for `go`."""
    reached = tmp_path / "reached"
    child = start(capture_held, reached, go, cwd=project.root, stderr=tmp_path / "holder.stderr")
    until(lambda: reached.exists() or not child.is_running(), "the first capture never began")
    assert child.is_running(), child.errors()
    yield child
    child.kill()


def words(holder: Child) -> str:
    return f"process {holder.pid} on {socket.gethostname()}"


def test_the_second_waits_for_the_first_and_then_needs_no_teacher(
    project, whole, holder, go, tmp_path, ledger
):
    second = start(capture_without_teacher, cwd=project.root, stderr=tmp_path / "second.stderr")
    until(lambda: "waiting for" in second.errors() or not second.is_running(), "nobody waits")
    line = next(line for line in second.errors().splitlines() if "waiting for" in line)
    seen = project.values()
    names = set(StoreReader(project.store).signals)
    pending = len(list(project.store.glob("receipts/*/0*.json")))
    go.touch()
    assert holder.wait() == 0, holder.errors()
    code = second.wait()
    same = project.digests() == whole.digests() and project.manifests() == whole.manifests()
    wrong = differ(seen, whole.whole)
    ledger.record(
        "two captures: second waits", detected=code == 0 and words(holder) in line, wrong=wrong
    )
    assert words(holder) in line
    assert "is writing this store" in line
    assert code == 0, second.errors()
    assert same
    assert not wrong
    # There were receipts of signals that readers were not shown.
    assert len(names) == 1 < len(whole.whole)
    assert pending > sum(len(values) for values in seen.values())


def test_the_second_does_not_wait_when_told_and_says_the_same_words(
    project, holder, tmp_path, ledger
):
    second = start(
        *(decant, "capture", "main", "--no-wait"), cwd=project.root, stderr=tmp_path / "stderr"
    )
    code = second.wait()
    line = second.error_line()
    is_said = words(holder) in line and "is writing this store" in line
    ledger.record("two captures: --no-wait", detected=code == 5 and is_said)
    assert code == 5
    assert is_said, line


def test_a_holder_that_is_killed_blocks_nobody(project, whole, holder, tmp_path, ledger):
    second = start(decant, "capture", "main", cwd=project.root, stderr=tmp_path / "stderr")
    until(lambda: "waiting for" in second.errors() or not second.is_running(), "nobody waits")
    before = project.receipts()
    assert holder.kill() == -signal.SIGKILL
    code = second.wait()
    after = project.receipts()
    lost = any(after.get(path) != written for path, written in before.items())
    same = project.digests() == whole.digests()
    ledger.record("two captures: killed holder", detected=code == 0 and same, lost=lost)
    assert code == 0, second.errors()
    assert same
    assert not lost
    assert words(holder) in second.errors()


def test_two_captures_of_different_signals_both_end_whole(project, holder, go, tmp_path, ledger):
    other = {"hidden": {"layers": [2], "form": "float16"}, **SEGMENTS}
    (tmp_path / "other").mkdir()
    elsewhere = SmallProject(tmp_path / "other")
    elsewhere.parameters(other)
    params = elsewhere.root / "params.yaml"
    second = start(
        *(decant, "capture", "main", "--params", str(params)),
        cwd=project.root,
        stderr=tmp_path / "stderr",
    )
    until(lambda: "waiting for" in second.errors() or not second.is_running(), "nobody waits")
    go.touch()
    codes = (holder.wait(), second.wait())
    kinds = [name.rpartition("-")[0] for name in StoreReader(project.store).signals]
    expected = ["attention/2/qk", "hidden/0/int8", "hidden/1/bfloat16", "hidden/2/float16",
                "hidden/2/int8", "logits/head"]  # fmt: skip
    ledger.record("two captures: other signals", detected=codes == (0, 0) and kinds == expected)
    assert codes == (0, 0), holder.errors() + second.errors()
    assert kinds == expected
    assert project.values().keys() == set(StoreReader(project.store).signals)
