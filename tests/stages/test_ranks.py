"""Several processes of one training: who starts them says one line and keeps the exit code."""

import errno
import signal
import subprocess

import pytest
import torch.distributed

from pipeline.errors import ConfigError
from stages import ranks
from stages.ranks import is_lost_peer, run_ranks

PROGRAM = "tests.stages.rank_program"


@pytest.fixture(autouse=True)
def _any_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def start(what: str) -> int:
    return run_ranks(PROGRAM, [what], processes=2, threads=3)


def test_all_go_well(capfd):
    assert start("nothing") == 0
    assert capfd.readouterr().err == ""


def test_each_knows_its_place(capfd):
    assert start("environment") == 9
    assert capfd.readouterr().err == "2 1 127.0.0.1 3\n"


@pytest.mark.parametrize(
    ("what", "code", "line"),
    [
        ("both refuse", 4, "error: refused by 0"),
        ("the second refuses", 3, "error: refused by 1"),
        ("the second refuses, the first is aborted", 3, "error: refused by 1"),
        ("both are lost", 75, "error: lost by 1"),
    ],
)
def test_an_error_is_said_once_with_its_exit_code(what, code, line, capfd):
    assert start(what) == code
    assert capfd.readouterr().err == f"{line}\n"


def test_who_waits_for_one_that_was_killed_is_ended(capfd, monkeypatch):
    monkeypatch.setattr(ranks, "GRACE_SECONDS", 0.1)
    assert start("the second is killed") == 137
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: process 1 was ended by signal 9")


def test_a_signal_is_passed_on_once_and_all_have_time_to_save(capfd, tmp_path, monkeypatch):
    monkeypatch.setenv("READY", str(tmp_path))
    before = signal.getsignal(signal.SIGTERM)
    assert start("all save when interrupted") == 143
    assert capfd.readouterr().err == "saved 0 1\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_one_that_does_not_start_leaves_no_other_behind(monkeypatch):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **kwargs):
            if started:
                raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
            super().__init__(*args, **kwargs)
            started.append(self)

    monkeypatch.setattr(ranks.subprocess, "Popen", Popen)
    with pytest.raises(OSError, match="temporarily"):
        start("the second is killed")
    assert started[0].returncode == -signal.SIGKILL


def test_a_lost_process_is_told_from_other_errors(monkeypatch):
    lost = RuntimeError("[pair.cc:547] Connection closed by peer [127.0.0.1]:3456")
    assert not is_lost_peer(lost)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert is_lost_peer(lost)
    assert is_lost_peer(torch.distributed.DistBackendError("NCCL error: ncclRemoteError"))
    assert not is_lost_peer(RuntimeError("shapes do not match"))


def test_more_processes_than_gpus_are_refused(monkeypatch):
    ranks.check_gpus("cuda:1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4096")
    ranks.check_gpus("cpu")
    ranks.check_gpus("auto")
    with pytest.raises(ConfigError, match="device: found cuda:1 for 4096 processes, expected cuda"):
        ranks.check_gpus("cuda:1")
    with pytest.raises(ConfigError, match="found 4096, expected at most one for each of the"):
        ranks.check_gpus("cuda")
