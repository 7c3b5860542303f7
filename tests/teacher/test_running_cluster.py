"""Schedulers and workers with command lines of their own: the same digests, whatever dies."""

import os
import shutil
import signal
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from distributed import Client
from distributed.comm import CommClosedError
from transformers import PreTrainedModel

from pipeline.errors import ResourceError
from pipeline.runtime import Runtime
from pipeline.teacher.capture import capture as capturing
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.workers import remote
from tests.captured import Captured, copied, prepared
from tests.captured import signal as signal_of
from tests.clusters import Servers, certificates, servers, until
from tests.faults.dying_teacher import DyingTeacher, hang

SIGNALS = [signal_of("hidden", 2, "int8"), signal_of("logits", None, "topk", k=8)]
JOINS = "import pathlib, time\nwhile not pathlib.Path({!r}).exists(): time.sleep(0.02)\n"
"""What a worker loads first that is to join late."""


@dataclass(frozen=True)
class HangingTeacher(DyingTeacher):
    """Hangs in every process but the one that captures."""

    here: int = 0

    def __call__(self, *arguments: Any, **keywords: Any) -> PreTrainedModel:
        model = load_teacher(*arguments, **keywords)
        if os.getpid() != self.here:
            model.get_input_embeddings().register_forward_pre_hook(self._look)
        return model


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("clusters")


@pytest.fixture(scope="module")
def tls(place) -> dict[str, Path]:
    return certificates(place / "pem")


@pytest.fixture(scope="module")
def clusters(place, tls) -> Iterator[dict[str, Servers]]:
    """Both at once, for most of their seconds go by in imports."""
    late = place / "late.py"
    late.write_text(JOINS.format(str(place / "go")))
    with (
        servers(place / "tcp", workers=[None, str(late)]) as open_one,
        servers(place / "tls", tls=tls) as closed,
    ):
        yield {"tcp": open_one, "tls": closed}


@pytest.fixture(scope="module")
def whole(place, clusters) -> Captured:
    found = prepared(place / "whole", "llama")
    found.capture(SIGNALS)
    return found


@pytest.fixture
def lost(whole, tmp_path) -> Captured:
    found = copied(whole, tmp_path / "copy")
    shutil.rmtree(found.stores)
    return found


def receipts(captured: Captured) -> list[Path]:
    return list(captured.stores.glob("*/receipts/*/0*.json"))


@pytest.mark.slow
def test_a_worker_dies_in_mid_segment_and_one_that_joined_late_takes_over(
    clusters, lost, whole, monkeypatch, place, caplog
):
    cluster, first = clusters["tcp"], clusters["tcp"].processes[1]
    segment = whole.reader.read_segment(0)
    longest = int(segment.offset[segment.length.argmax()])
    row = tuple(segment.tokens["input_ids"][longest : longest + 3].tolist())
    teacher = HangingTeacher({row: hang}, place / "deaths", here=os.getpid())
    monkeypatch.setattr(capturing, "load_teacher", teacher)

    def disturb() -> None:
        until(teacher.count)
        assert teacher.pids(row) == [first.pid]
        (place / "go").touch()
        # Another worker is at work, while the first one never finishes.
        until(lambda: receipts(lost))
        os.kill(first.pid, signal.SIGKILL)

    with ThreadPoolExecutor() as pool:
        disturbed = pool.submit(disturb)
        lost.capture(SIGNALS, scheduler=cluster.address, threads=1)
    disturbed.result()
    assert lost.digests() == whole.digests(), cluster.log()
    warnings = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["a worker died on segment 0 (1 of 3); running it again"]
    with remote.running_cluster(Runtime(scheduler=cluster.address)) as client:
        # By value: a function with a name would be imported there, and with it torch.
        there = client.run_on_scheduler(
            lambda dask_scheduler: [
                *dask_scheduler.tasks,
                *dask_scheduler.worker_plugins,
                *(name for name in sys.modules if name in {"pipeline", "torch"}),
            ]
        )
    assert there == ["shuffle"]


@pytest.mark.slow
def test_certificates_are_what_a_stranger_lacks(clusters, lost, whole, tls, monkeypatch, tmp_path):
    cluster = clusters["tls"]
    lost.capture(SIGNALS, scheduler=cluster.address, threads=1, **tls)
    assert lost.digests() == whole.digests(), cluster.log()
    monkeypatch.setattr(remote, "ANSWER_SECONDS", 1.0)
    strangers = [
        (cluster.address, certificates(tmp_path / "others")),
        (cluster.address.replace("tls", "tcp"), {}),
    ]
    for address, shown in strangers:
        with (
            pytest.raises(ResourceError, match=f"scheduler {address}: no answer within 1 s"),
            remote.running_cluster(Runtime(scheduler=address, **shown)),
        ):
            pass


@pytest.mark.slow
@pytest.mark.parametrize("call", ["run", "register_plugin", "submit", "_gather"])
def test_a_scheduler_that_ends_at_any_call_ends_the_capture(clusters, lost, monkeypatch, call):
    """It may end between a task and the fetching of its result."""
    cluster = clusters["tcp"]

    def unreachable(*_: object, **__: object) -> None:
        raise CommClosedError("in <TCP>: Connect call failed")

    monkeypatch.setattr(Client, call, unreachable)
    with pytest.raises(ResourceError, match=f"scheduler {cluster.address}: is gone"):
        lost.capture(SIGNALS, scheduler=cluster.address, threads=1)


@pytest.mark.slow
def test_a_scheduler_that_ends_ends_the_capture(clusters, lost, tls, monkeypatch):
    """The last test of this cluster."""
    cluster = clusters["tls"]
    monkeypatch.setattr(remote, "ANSWER_SECONDS", 2.0)
    publish = capturing.SignalWriter.publish_segment

    def end_the_scheduler(*arguments: Any, **keywords: Any) -> None:
        publish(*arguments, **keywords)
        cluster.processes[0].kill()

    monkeypatch.setattr(capturing.SignalWriter, "publish_segment", end_the_scheduler)
    with pytest.raises(ResourceError, match=f"scheduler {cluster.address}: is gone"):
        lost.capture(SIGNALS, scheduler=cluster.address, **tls)
    assert receipts(lost)
