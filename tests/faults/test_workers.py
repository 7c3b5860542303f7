"""Worker processes of a capture die: the same digests, or exit 5 that names the segment."""

import http.client
import multiprocessing.forkserver
import os
import shutil
import signal
import socket
import ssl
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path
from typing import Any

import distributed.utils
import pytest
from click.testing import CliRunner, Result

from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.errors import ResourceError
from pipeline.store.commit import SignalWriter
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.teacher.capture import capture as module
from pipeline.teacher.capture.spec import SegmentOptions
from pipeline.teacher.capture.token_rows import plan_rows
from pipeline.teacher.workers import workers
from pipeline.teacher.workers.cluster import start_fork_server
from stages.cli import main
from tests.faults import dying_teacher
from tests.faults.dying_teacher import Beginning, DyingTeacher
from tests.faults.forked import Child, decant, start
from tests.faults.small_project import SEGMENTS, SmallProject, small_project

INTERRUPTED = 130
PATIENCE_SECONDS = 20.0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> SmallProject:
    """A project whose store was captured in one process, undisturbed."""
    project = small_project(tmp_path_factory.mktemp("workers") / "project")
    assert in_workers(project, "synchronous").exit_code == 0
    return project


@pytest.fixture
def lost(whole, tmp_path) -> SmallProject:
    """The same project without its store."""
    project = whole.copy(tmp_path / "project")
    shutil.rmtree(project.stores)
    return project


def in_workers(project: SmallProject, scheduler: str = "processes", **settings: int) -> Result:
    """Run the stage in this process, which holds the store's lock and starts the workers."""
    lines = {"device": "cpu", "threads": 1, "scheduler": scheduler, "workers": 2, **settings}
    text = "".join(f"{key}: {value}\n" for key, value in lines.items())
    (project.root / "runtime.yaml").write_text(text)
    before = Path.cwd()
    os.chdir(project.root)
    try:
        return CliRunner().invoke(main, ["capture", "main"], catch_exceptions=False)
    finally:
        os.chdir(before)


def capture_alone(project: SmallProject, tmp_path: Path, *, borrow: bool = True) -> Child:
    """Run the stage in a process of its own; its workers are forked by a server of this one's.

    Unless it may not `borrow` that: then it has its own, in its session, which takes seconds.
    """
    text = "device: cpu\nthreads: 1\nscheduler: processes\nworkers: 2\n"
    (project.root / "runtime.yaml").write_text(text)
    if borrow:
        start_fork_server(workers.__name__)
    return start(capture_with, borrow, cwd=project.root, stderr=tmp_path / "stderr")


def capture_with(borrow: bool) -> None:
    """Be a fork, to which Dask's thread is lost and the fork server no child."""
    distributed.utils._offload_executor = ThreadPoolExecutor(max_workers=1)
    server: Any = multiprocessing.forkserver._forkserver
    if borrow:
        server.ensure_running = multiprocessing.forkserver.ensure_running = lambda: None
    else:
        server._forkserver_pid = server._forkserver_alive_fd = server._forkserver_address = None
    decant("capture", "main")


def beginnings(project: SmallProject) -> list[Beginning]:
    """Return how the longest row of each segment begins; no other row does."""
    reader = StoreReader(project.store)
    found = []
    for number in range(len(reader.plan["segments"])):
        segment = reader.read_segment(number)
        first = int(segment.offset[segment.length.argmax()])
        found.append(tuple(segment.tokens["input_ids"][first : first + 3].tolist()))
    assert len(set(found)) == len(found)
    return found


def poison(
    monkeypatch: pytest.MonkeyPatch,
    whole: SmallProject,
    lost: SmallProject,
    what: dict[int, Callable[[], None]],
    times: int = 1,
) -> DyingTeacher:
    """Let workers meet rows of some segments that end them; `what` is by segment."""
    rows = beginnings(whole)
    doing = {rows[segment]: do for segment, do in what.items()}
    teacher = DyingTeacher(doing, lost.root.parent / "deaths", times)
    monkeypatch.setattr(module, "load_teacher", teacher)
    return teacher


def kill_when_it_hangs(teacher: DyingTeacher, row: Beginning) -> None:
    """From outside, in mid-segment."""
    until(lambda: teacher.pids(row))
    os.kill(teacher.pids(row)[0], signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Tell whether a process runs; one that waits to be buried does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def processes_of(session: int) -> list[int]:
    """Return the living processes of a session."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def until(happened: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE_SECONDS
    while not happened():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_worker_that_dies_costs_its_segment_another_run(
    ledger, times, lost, whole, monkeypatch, caplog
):
    """More than three workers in all, but of different segments: they do not add up."""
    what = {
        0: dying_teacher.hang,
        1: dying_teacher.crash,
        2: dying_teacher.take_memory,
        3: dying_teacher.ask_for_too_much,
    }
    faults = ["worker killed", "worker segfault", *["worker out of memory"] * 2]
    for number in range(times(1, 10)):
        project = lost.copy(lost.root.with_name(f"lost-{number}") / "project")
        teacher = poison(monkeypatch, whole, project, what)
        with ThreadPoolExecutor() as killer:
            killed = killer.submit(kill_when_it_hangs, teacher, next(iter(teacher.what)))
            result = in_workers(project, worker_megabytes=900)
        killed.result()
        is_complete = result.exit_code == 0 and project.manifests() == whole.manifests()
        for fault in faults:
            ledger.record(fault, detected=is_complete, lost=not is_complete)
        assert result.exit_code == 0, result.stderr
        assert teacher.count() == len(what)
        assert project.manifests() == whole.manifests()
        assert project.digests() == whole.digests()
        assert project.unfinished() == []
        assert "Traceback" not in result.output
        warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
        assert sorted(warnings) == [
            f"a worker died on segment {number} (1 of 3); running it again" for number in what
        ]
        caplog.clear()


@pytest.mark.slow
def test_a_row_that_kills_every_worker_is_named(ledger, lost, whole, monkeypatch, tmp_path):
    """In a process of its own, so that all that it says is seen."""
    teacher = poison(monkeypatch, whole, lost, {1: dying_teacher.be_killed}, times=1000)
    child = capture_alone(lost, tmp_path)
    code = child.wait()
    kept = lost.receipts()
    ledger.record("row that kills every worker", detected=code == 5, lost=not kept)
    assert code == 5, child.errors()
    reader = StoreReader(whole.store)
    rows = reader.examples["row"][reader.examples_in(1)].tolist()
    assert child.error_line().startswith(
        "error: segment 1: 3 workers died on it (killed, out of memory, or a crash of the teacher)"
    )
    assert f"look at rows {', '.join(map(str, rows))} of split train" in child.error_line()
    lines = child.errors().replace("\r", "\n").splitlines()
    shown = [line for line in lines if line.strip() and "%|" not in line]
    assert shown == [
        "checking the teacher's taps against its own outputs",
        "taps agree with the teacher's own outputs on 2 examples",
        "writing blocks 1 of the teacher",
        "5 of 5 segments to capture",
        "a worker died on segment 1 (1 of 3); running it again",
        "a worker died on segment 1 (2 of 3); running it again",
        child.error_line(),
    ]
    assert teacher.count() == 3
    monkeypatch.undo()
    assert in_workers(lost, "synchronous").exit_code == 0
    assert lost.manifests() == whole.manifests()
    again = lost.receipts()
    assert {path: again[path] for path in kept} == kept


@pytest.mark.slow
def test_workers_end_with_a_killed_capture_and_the_next_goes_on(
    ledger, lost, whole, monkeypatch, tmp_path
):
    teacher = poison(monkeypatch, whole, lost, {1: dying_teacher.hang})
    child = capture_alone(lost, tmp_path)
    until(teacher.count)
    until(lost.receipts)
    (worker,) = teacher.pids(next(iter(teacher.what)))
    assert is_alive(worker)
    assert child.kill() == -signal.SIGKILL
    kept = lost.receipts()
    until(lambda: not is_alive(worker))
    monkeypatch.undo()
    result = in_workers(lost, "synchronous")
    is_complete = result.exit_code == 0 and lost.manifests() == whole.manifests()
    again = lost.receipts()
    rewritten = {path: again.get(path) for path in kept} != kept
    ledger.record("orphaned worker", detected=is_complete, lost=rewritten)
    assert result.exit_code == 0, result.stderr
    assert lost.manifests() == whole.manifests()
    assert not rewritten
    assert lost.unfinished() == []


def listening(pids: Sequence[int]) -> list[str]:
    """Return the addresses at which processes wait for TCP connections."""
    table = subprocess.run(
        ["ss", "--listening", "--tcp", "--numeric", "--processes", "--no-header"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return [
        line.split()[3] for line in table.splitlines() if any(f"pid={pid}," in line for pid in pids)
    ]


def answers_a_stranger(address: str) -> bool:
    """Tell whether more than a refusal comes back, over TLS without a certificate or over HTTP."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    host, _, port = address.rpartition(":")
    try:
        plain = socket.create_connection((host, int(port)), timeout=2)
        with plain, context.wrap_socket(plain) as encrypted:
            # Under TLS 1.3 the server looks for the certificate after the client's handshake.
            return bool(encrypted.recv(1))
    except ssl.SSLError as error:
        if error.reason != "WRONG_VERSION_NUMBER":
            return False
    except OSError:
        return False
    connection = http.client.HTTPConnection(host, int(port), timeout=2)
    connection.request("GET", "/info/main/workers.html")
    with connection.getresponse() as answer:
        return answer.status != HTTPStatus.NOT_FOUND


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("ss") is None, reason="no ss on PATH")
def test_workers_listen_on_loopback_and_end_at_once_with_an_interrupted_capture(
    ledger, lost, whole, monkeypatch, tmp_path
):
    """Ctrl-C reaches every process of the terminal; a worker in mid-segment is not waited for."""
    teacher = poison(monkeypatch, whole, lost, {1: dying_teacher.hang})
    child = capture_alone(lost, tmp_path, borrow=False)
    until(teacher.count)
    until(lost.receipts)
    addresses = listening(processes_of(child.pid))
    is_open = [address for address in addresses if not address.startswith("127.0.0.1:")]
    is_open += [address for address in addresses if answers_a_stranger(address)]
    ledger.record("stranger at a worker's port", detected=bool(addresses) and not is_open)
    begun = time.monotonic()
    os.killpg(child.pid, signal.SIGINT)
    code = child.wait()
    seconds = time.monotonic() - begun
    assert addresses
    assert not is_open
    assert code == INTERRUPTED, child.errors()
    assert seconds < 10
    assert "Traceback" not in child.errors()
    lines = child.errors().splitlines()
    assert lines[-1] == "interrupted; the same command keeps every finished segment"
    until(lambda: not processes_of(child.pid))
    # Python's tracker of semaphores ends last, and had a warning to say.
    assert "resource_tracker" not in child.errors()
    monkeypatch.undo()
    kept = lost.receipts()
    assert in_workers(lost, "synchronous").exit_code == 0
    assert lost.manifests() == whole.manifests()
    again = lost.receipts()
    assert {path: again[path] for path in kept} == kept


def stage_on_and_on(writer: SignalWriter, attempt: str, stop: Path) -> None:
    """Be a worker whose capture is gone: stage zeros until told to stop, whatever comes of it."""
    refused = False
    while not stop.exists():
        try:
            writer.stage_segment(0, writer.buffers(), rows="of nobody", attempt=attempt)
        except ResourceError as error:
            refused = "another capture has taken over this store" in str(error)
        else:
            assert not refused, "an attempt that was over took a shard"
            Path(stop.parent / "staged").touch()
    assert refused


@pytest.mark.usefixtures("unsynced")
def test_an_orphan_that_lives_on_neither_writes_nor_publishes(ledger, lost, whole, tmp_path):
    """A real process that stages into the old attempt before, while and after the next runs."""
    shutil.copytree(whole.stores, lost.stores)
    layout = Layout(lost.store)
    declared = StoreReader(lost.store).signal(next(iter(whole.digests()))).declaration
    sizes: dict[str, Any] = {**SEGMENTS}
    options = SegmentOptions(**sizes)
    rows = TokenSet.load(lost.data / "corpus" / "tokens" / "main")
    writer = SignalWriter(layout, plan_rows(rows, options), options.chunk_tokens, declared)
    for receipt in (layout.root / "receipts").glob("*/0*.json"):
        receipt.unlink()
    layout.attempt("old").mkdir(parents=True)
    stop = tmp_path / "stop"
    orphan = start(stage_on_and_on, writer, "old", stop, stderr=tmp_path / "stderr")
    until((tmp_path / "staged").exists)
    result = in_workers(lost, "synchronous")
    stop.touch()
    code = orphan.wait()
    wrong = lost.manifests() != whole.manifests()
    ledger.record("orphaned worker", detected=code == 0 and not wrong, wrong=wrong)
    assert result.exit_code == 0, result.stderr
    assert code == 0, orphan.errors()
    assert lost.manifests() == whole.manifests()
    assert lost.digests() == whole.digests()
    assert lost.unfinished() == []
