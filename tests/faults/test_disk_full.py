"""A disk that is full: told before the teacher starts; one line and nothing lost when it happens.

The disk is a small one in memory, or a limit on the size of a file where a process may not mount.
"""

import ctypes
import os
import random
import resource
import shutil
from collections import namedtuple
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipeline.student.loop import checkpoint
from pipeline.teacher.capture import capture as module
from pipeline.teacher.capture.disk_space import DISK_RESERVE_BYTES
from tests.faults.forked import decant, start
from tests.faults.small_project import SmallProject, differ, small_project

KIB = 1024
PAGE_BYTES = 4 * KIB
LIBC = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> SmallProject:
    return small_project(tmp_path_factory.mktemp("bare") / "project")


@pytest.fixture(scope="module")
def whole(bare, tmp_path_factory) -> SmallProject:
    """Everything captured and a student trained, with all the room there is."""
    project = bare.copy(tmp_path_factory.mktemp("whole") / "project")
    for stage in (("capture", "main"), ("select", "small"), ("train", "small")):
        child = start(decant, *stage, cwd=project.root, stderr=project.root / "stderr")
        assert child.wait() == 0, child.errors()
    return project


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Return a function that mounts an empty disk of so many bytes, or makes it larger."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size: int) -> Path:
        flags = 32 if place.is_mount() else 0  # MS_REMOUNT
        options = f"size={size}".encode()
        if LIBC.mount(b"decant", bytes(place), b"tmpfs", flags, options) != 0:
            pytest.skip(f"no mount of a small disk here: {os.strerror(ctypes.get_errno())}")
        return place

    yield mount
    if place.is_mount():
        assert LIBC.umount2(bytes(place), 2) == 0  # MNT_DETACH


def fails_for_space(project: SmallProject, *stage: str) -> str:
    """Run a stage that is to end with exit code 5; return its line."""
    stderr = project.root.parent / f"{stage[0]}.stderr"
    stderr.unlink(missing_ok=True)
    child = start(decant, *stage, cwd=project.root, stderr=stderr)
    assert child.wait() == 5, child.errors()
    return child.error_line()


def completes(project: SmallProject, *stage: str) -> None:
    stderr = project.root.parent / f"{stage[0]}.stderr"
    child = start(decant, *stage, cwd=project.root, stderr=stderr)
    assert child.wait() == 0, child.errors()


def used_bytes(folder: Path) -> int:
    """What files take of a disk in memory."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return sum(-(-size // PAGE_BYTES) * PAGE_BYTES for size in sizes)


def no_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the estimate pass, so that the disk is what stops the capture."""
    monkeypatch.setattr(module, "require_space", lambda root, needed: None)


@pytest.mark.usefixtures("unsynced")
def test_the_estimate_comes_before_the_teacher_is_loaded(bare, tmp_path, monkeypatch, ledger):
    project = bare.copy(tmp_path / "project")
    usage = namedtuple("usage", "total used free")
    free = DISK_RESERVE_BYTES + 1000

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the teacher was loaded")

    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**12, 0, free))
    monkeypatch.setattr(module, "load_teacher", refuse)
    line = fails_for_space(project, "capture", "main")
    is_said = f"{free:,} bytes free, the missing features need up to 67,1" in line
    written = [path.name for path in project.store.rglob("*") if path.is_file()]
    ledger.record("disk full: estimated", detected=is_said, wrong=written != ["lock"])
    assert is_said, line
    assert written == ["lock"]


@pytest.mark.usefixtures("unsynced")
def test_a_full_disk_stops_a_capture_and_room_completes_it(
    bare, whole, small_disk, monkeypatch, times, ledger
):
    no_reserve(monkeypatch)
    needed = used_bytes(whole.stores) + used_bytes(whole.data / "manifests")
    draw = random.Random(7)
    for _ in range(times(1, 25)):
        room = draw.randint(needed // 8, needed - needed // 16)
        disk = small_disk(room + used_bytes(bare.root))
        project = bare.copy(disk / "project")
        line = fails_for_space(project, "capture", "main")
        is_said = "No space left on device" in line and " free" in line
        before = project.receipts()
        wrong = differ(project.values(), whole.whole) or bool(project.unfinished())
        small_disk(2 * needed + used_bytes(disk))
        completes(project, "capture", "main")
        after = project.receipts()
        lost = any(after.get(path) != written for path, written in before.items())
        same = project.digests() == whole.digests() and project.manifests() == whole.manifests()
        ledger.record("disk full: capture", detected=is_said and same, wrong=wrong, lost=lost)
        assert is_said, line
        assert not wrong
        assert not lost
        assert same
        shutil.rmtree(project.root)
        assert LIBC.umount2(bytes(disk), 2) == 0


def limit_files(size: int, *stage: str) -> None:
    """Run a stage in a child whose files may not grow beyond a size."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    decant(*stage)


@pytest.mark.usefixtures("unsynced")
def test_a_file_that_may_not_grow_stops_either_stage(whole, tmp_path, ledger):
    """Stage one in a shard, stage two in a checkpoint; a quota says the same."""
    project = whole.copy(tmp_path / "project")
    shutil.rmtree(project.stores)
    shutil.rmtree(project.student)
    for stage, size in ((("capture", "main"), 4000), (("train", "small"), 30_000)):
        stderr = tmp_path / f"{stage[0]}.stderr"
        child = start(limit_files, size, *stage, cwd=project.root, stderr=stderr)
        code = child.wait()
        detected = code == 5 and "Traceback" not in child.errors()
        ledger.record(f"file limit: {stage[0]}", detected=detected)
        assert code == 5, child.errors()
        line = child.error_line()
        assert "needs" in line
        assert "free" in line
        completes(project, *stage)
    assert project.digests() == whole.digests()
    assert (project.student / "model.safetensors").read_bytes() == (
        whole.student / "model.safetensors"
    ).read_bytes()
    assert project.curve.read_bytes() == whole.curve.read_bytes()
    assert project.unfinished() == []


@pytest.mark.usefixtures("unsynced")
def test_a_full_disk_stops_a_training_and_room_completes_it(
    whole, small_disk, monkeypatch, times, ledger
):
    """In a checkpoint or in the export: what is whole is gone on from, to the same bits."""
    # Let the estimate pass.
    monkeypatch.setattr(checkpoint, "check_room", lambda *_: None)
    student = used_bytes(whole.student)
    draw = random.Random(8)
    for _ in range(times(1, 25)):
        # Three checkpoints lie there at once, each of weights and of twice as much for the moments.
        room = draw.randint(student // 2, 8 * student)
        disk = small_disk(2**26)
        project = whole.copy(disk / "project")
        shutil.rmtree(project.student)
        project.curve.unlink()
        small_disk(room + used_bytes(disk))
        stderr = disk.parent / "train.stderr"
        stderr.unlink(missing_ok=True)
        child = start(decant, "train", "small", cwd=project.root, stderr=stderr)
        code = child.wait()
        assert code in (0, 5), child.errors()
        is_said = code == 0 or "free" in child.error_line()
        wrong = project.student.exists() and code != 0 and not _same_student(project, whole)
        small_disk(2**26)
        completes(project, "train", "small")
        same = _same_student(project, whole)
        same &= project.curve.read_bytes() == whole.curve.read_bytes()
        if code:
            ledger.record("disk full: training", detected=is_said and same, wrong=wrong)
        assert is_said, child.errors()
        assert not wrong
        assert same
        assert project.unfinished() == []
        assert LIBC.umount2(bytes(disk), 2) == 0


@pytest.mark.usefixtures("unsynced")
def test_room_for_checkpoints_is_looked_for_before_the_first_step(whole, small_disk, ledger):
    student = used_bytes(whole.student)
    disk = small_disk(2**26)
    project = whole.copy(disk / "project")
    shutil.rmtree(project.student)
    small_disk(used_bytes(disk) + student)
    line = fails_for_space(project, "train", "small")
    is_said = "bytes free, 3 checkpoints need about" in line
    wrong = project.student.exists() or bool(list(project.data.glob("work/train/*/checkpoint-*")))
    ledger.record("disk full: training estimated", detected=is_said, wrong=wrong)
    assert is_said, line
    assert not wrong


def _same_student(project: SmallProject, whole: SmallProject) -> bool:
    names = {path.name for path in whole.student.iterdir()}
    return names == {path.name for path in project.student.iterdir()} and all(
        (project.student / name).read_bytes() == (whole.student / name).read_bytes()
        for name in names
    )
