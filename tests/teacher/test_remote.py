"""A guest of a cluster: it computes the same there, refuses what does not fit, and cleans up."""

import logging
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.errors import ConfigError, IncompatibleError, ResourceError
from pipeline.store.commit import SignalWriter
from pipeline.teacher.capture import capture as capturing
from pipeline.teacher.capture.segments import SegmentCapture
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.source.reference import TeacherReference
from pipeline.teacher.workers import remote, worker, workers
from pipeline.teacher.workers.worker import DEATHS, DeadlySegmentError, TeacherPlugin, marks
from tests.captured import Captured, copied, prepared, signal
from tests.clusters import certificates, cluster_within

SIGNALS = [signal("hidden", 2, "int8"), signal("attention", 2, "qk")]
ADDRESS = "tcp://127.0.0.1:9"
"""The port of a protocol that nobody uses any more."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("whole"), "llama")
    found.capture(SIGNALS)
    return found


@pytest.fixture
def lost(whole, tmp_path) -> Captured:
    """The same without its store."""
    found = copied(whole, tmp_path / "copy")
    shutil.rmtree(found.stores)
    return found


@pytest.fixture(scope="module")
def cluster():
    with cluster_within() as found:
        yield found


def never(*_: object, **__: object) -> None:
    raise AssertionError("the teacher was loaded")


def only_here(*arguments, **keywords):
    if threading.current_thread() is threading.main_thread():
        return load_teacher(*arguments, **keywords)
    raise ConfigError("teacher main: cannot be loaded")


def is_clean(cluster) -> bool:
    """Tell whether a cluster has nothing of a capture."""
    names = [name for one in cluster.workers.values() for name in one.plugins]
    names += cluster.scheduler.worker_plugins
    return not cluster.scheduler.tasks and not any(name.startswith("decant") for name in names)


@pytest.fixture
def other_torch(monkeypatch):
    """Let a module ask for another version of torch than there is."""

    def ask(module) -> None:
        asked = remote.requirements

        def requirements(*arguments):
            wanted = asked(*arguments)
            return replace(wanted, identity=wanted.identity | {"torch": "0.1"})

        monkeypatch.setattr(module, "requirements", requirements)

    return ask


def test_a_cluster_computes_the_same_and_forgets(lost, whole, cluster):
    threads = torch.get_num_threads()
    lost.capture(SIGNALS, scheduler=cluster.scheduler_address, threads=1)
    assert lost.digests() == whole.digests()
    assert torch.get_num_threads() == threads
    assert is_clean(cluster)


def test_a_worker_of_many_threads_runs_one_segment_at_a_time(lost, whole, monkeypatch):
    running, most = threading.Semaphore(1), []

    class Watched(SegmentCapture):
        def __call__(self, *arguments):
            alone = running.acquire(blocking=False)
            most.append(alone)
            try:
                return super().__call__(*arguments)
            finally:
                if alone:
                    running.release()

    monkeypatch.setattr(worker, "SegmentCapture", Watched)
    with cluster_within(workers=1, threads=4) as cluster:
        lost.capture(SIGNALS, scheduler=cluster.scheduler_address)
    assert len(most) > 1
    assert all(most)
    assert lost.digests() == whole.digests()


def test_an_interrupted_capture_leaves_the_cluster_clean(lost, cluster, monkeypatch):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SignalWriter, "publish_segment", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lost.capture(SIGNALS, scheduler=cluster.scheduler_address)
    assert is_clean(cluster)


def test_another_version_is_refused_before_the_teacher_is_loaded(
    lost, cluster, monkeypatch, other_torch
):
    other_torch(remote)
    monkeypatch.setattr(capturing, "load_teacher", never)
    with pytest.raises(IncompatibleError, match=r"worker tcp://\S+: torch is 2\S+, expected 0\.1"):
        lost.capture(SIGNALS, scheduler=cluster.scheduler_address)


def test_a_worker_that_joins_late_with_another_version_is_refused(lost, cluster, other_torch):
    other_torch(workers)
    with pytest.raises(IncompatibleError, match=r"worker tcp://\S+: torch is 2\S+, expected 0\.1"):
        lost.capture(SIGNALS, scheduler=cluster.scheduler_address)
    assert is_clean(cluster)


@pytest.mark.parametrize("there", ["another store", "nothing"])
def test_a_worker_that_does_not_see_the_store_is_refused(
    lost, cluster, monkeypatch, tmp_path, there
):
    elsewhere = tmp_path / "store" / "staging" / "attempt" / "proof"
    if there == "another store":
        elsewhere.parent.mkdir(parents=True)
        elsewhere.write_text("of another capture")
    asked = remote.requirements
    monkeypatch.setattr(
        remote, "requirements", lambda *given: replace(asked(*given), proof=str(elsewhere))
    )
    wanted = rf"worker tcp://\S+: does not see .* into {tmp_path / 'store'} .*same absolute path"
    with pytest.raises(ConfigError, match=wanted):
        lost.capture(SIGNALS, scheduler=cluster.scheduler_address)


def test_a_worker_without_the_device_is_refused(tmp_path):
    wanted = remote.requirements(tmp_path, "cpu")
    assert remote.refusal(wanted, ADDRESS) is None
    refused = remote.refusal(replace(wanted, device="cuda:77"), ADDRESS)
    assert isinstance(refused, ConfigError)
    assert f"worker {ADDRESS}: no device 'cuda:77'" in str(refused)


def test_the_identity_of_the_software_covers_the_complete_package(monkeypatch):
    read, read_bytes = [], Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: read.append(path) or read_bytes(path))
    remote._identity()
    package = Path(remote.__file__).parents[2]
    assert package.name == "pipeline"
    assert {package / "store" / "commit.py", package / "taps" / "tap.py"} <= set(read)


def test_a_worker_without_this_software_is_refused(lost, cluster, monkeypatch):
    def missing(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'pipeline'")

    monkeypatch.setattr(remote, "_check_worker", missing)
    with pytest.raises(IncompatibleError, match=r"worker \S+: cannot run .*No module named"):
        lost.capture(SIGNALS, scheduler=cluster.scheduler_address)


def test_a_teacher_that_a_worker_does_not_have_is_named_with_the_worker(lost, cluster, monkeypatch):
    monkeypatch.setattr(capturing, "load_teacher", only_here)
    with pytest.raises(ConfigError, match=r"worker tcp://\S+: teacher main: cannot be loaded"):
        lost.capture(SIGNALS, scheduler=cluster.scheduler_address)
    assert is_clean(cluster)


def test_a_cluster_without_workers_is_waited_for_and_then_given_up(lost, monkeypatch):
    monkeypatch.setattr(workers, "NO_WORKER_SECONDS", 0.3)
    with cluster_within(workers=0) as cluster:
        address = cluster.scheduler_address
        with pytest.raises(ResourceError, match=rf"scheduler {address}: no worker for 0 s"):
            lost.capture(SIGNALS, scheduler=address)


def test_nobody_at_the_address_is_one_line(lost, monkeypatch):
    monkeypatch.setattr(remote, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(capturing, "load_teacher", never)
    with pytest.raises(ResourceError, match=rf"scheduler {ADDRESS}: no answer within .*start it"):
        lost.capture(SIGNALS, scheduler=ADDRESS)


@pytest.mark.parametrize(
    ("scheduler", "given", "message"),
    [
        ("tls://host:8786", {}, "tls_ca, tls_cert, tls_key missing, expected paths of PEM"),
        ("tls://host:8786", {"ca": "ca"}, "tls_cert, tls_key missing"),
        ("tcp://host:8786", {"ca": "ca"}, "tcp:// uses no certificates, but tls_ca is given"),
        (
            "tls://host:8786",
            {"ca": "ca", "cert": "cert", "key": "gone"},
            "tls_key: .* is not a file",
        ),
        ("tls://host:8786", {"ca": "ca", "cert": "ca", "key": "text"}, "cannot be used .* the key"),
    ],
)
def test_certificates_are_refused_before_anybody_is_asked(
    lost, tmp_path, scheduler, given, message
):
    certificates(tmp_path)
    (tmp_path / "text.pem").write_text("no certificate")
    tls = {f"tls_{name}": tmp_path / f"{file}.pem" for name, file in given.items()}
    with pytest.raises(ConfigError, match=message):
        lost.capture(SIGNALS, scheduler=scheduler, **tls)


@pytest.mark.parametrize(
    ("address", "is_warned"),
    [
        ("tcp://127.0.0.1:8786", False),
        ("tcp://localhost:8786", False),
        ("tcp://[::1]:8786", False),
        ("tls://node7:8786", False),
        ("tcp://node7:8786", True),
        ("tcp://10.0.0.7:8786", True),
    ],
)
def test_a_cluster_that_anybody_may_send_code_to_is_warned_of(caplog, address, is_warned):
    with caplog.at_level(logging.WARNING):
        remote._warn_if_open(address)
    assert [record.message[: len(address)] for record in caplog.records] == [address] * is_warned


def test_a_segment_spares_the_fourth_worker(tmp_path):
    marks(tmp_path).mkdir()
    plugin = TeacherPlugin("name", b"", "attempt", tmp_path, 0)
    for _ in range(DEATHS):
        plugin._begin(1)
    plugin._begin(11)
    with pytest.raises(DeadlySegmentError):
        plugin._begin(1)


def test_a_local_teacher_is_found_from_another_directory(whole, tmp_path, monkeypatch):
    reference = TeacherReference.load(whole.teacher)
    assert reference.anywhere() is reference
    local = replace(reference, model="models/mine", trained=False)
    monkeypatch.chdir(tmp_path)
    assert local.anywhere() is local
    (tmp_path / "models/mine").mkdir(parents=True)
    assert local.anywhere().location(whole.teacher) == str(tmp_path / "models/mine")
