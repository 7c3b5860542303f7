"""One writer a store: held by the kernel, freed by death, and never on a file that is gone."""

import errno
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pipeline.errors import IntegrityError, ResourceError
from pipeline.store.lock import writer_lock

HOLD = """
import sys, time
from pathlib import Path
from pipeline.store.lock import writer_lock
with writer_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path):
    """Another process that holds the lock of `tmp_path / "s"`."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "s" / "lock")],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_writer_is_told_who_holds_it_and_kill_9_frees_it(tmp_path, holder):
    path = tmp_path / "s" / "lock"
    named = rf"process {holder.pid} on {socket.gethostname()} is writing this store"
    with pytest.raises(ResourceError, match=named) as raised, writer_lock(path, wait=False):
        pass
    assert raised.value.exit_code == 5
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with writer_lock(path, wait=False):
        assert path.read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"


def test_a_second_writer_waits(tmp_path, holder, caplog):
    threading.Timer(0.2, holder.kill).start()
    with writer_lock(tmp_path / "s" / "lock"):
        assert holder.wait() == -signal.SIGKILL
    assert f"waiting for process {holder.pid}" in caplog.text


def test_it_is_freed_by_an_error_in_the_block(tmp_path):
    with pytest.raises(KeyError), writer_lock(tmp_path / "lock"):
        raise KeyError
    with writer_lock(tmp_path / "lock", wait=False):
        pass


def test_who_waited_while_the_store_was_removed_locks_the_new_one(tmp_path):
    path = tmp_path / "s" / "lock"
    entered, leave = threading.Event(), threading.Event()

    def wait_for_it() -> None:
        with writer_lock(path):
            entered.set()
            leave.wait(10)

    with writer_lock(path):
        waiter = threading.Thread(target=wait_for_it, daemon=True)
        waiter.start()
        assert not entered.wait(0.1)
        shutil.rmtree(path.parent)
    assert entered.wait(5)
    # A third sees the lock of the second: they hold the same file, not one that is gone.
    with pytest.raises(ResourceError, match="is writing"), writer_lock(path, wait=False):
        pass
    leave.set()
    waiter.join()


def test_an_unwritable_place_is_one_line(tmp_path):
    (tmp_path / "s").write_text("a file")
    with pytest.raises(ResourceError, match="cannot be made"), writer_lock(tmp_path / "s" / "lock"):
        pass


def test_a_full_disk_keeps_nobody_from_the_lock(tmp_path, monkeypatch):
    """The holder's name is a courtesy, the lock is the kernel's."""

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "s" / "lock"
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        found = pytest.raises(ResourceError, match="another process is writing")
        with writer_lock(path), found, writer_lock(path, wait=False):
            pass


@pytest.mark.parametrize("kind", ["link", "pipe", "directory"])
def test_what_is_no_file_is_no_lock(tmp_path, kind):
    """A store from elsewhere must not make a capture empty a file outside, or wait for ever."""
    outside, path = tmp_path / "outside", tmp_path / "s" / "lock"
    outside.write_text("kept")
    path.parent.mkdir()
    make = {"link": lambda: path.symlink_to(outside), "pipe": lambda: os.mkfifo(path)}
    make.get(kind, path.mkdir)()
    with pytest.raises(IntegrityError, match="lock: is no plain file"), writer_lock(path):
        pass
    assert outside.read_text() == "kept"
