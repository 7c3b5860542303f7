"""One worker process a GPU, counted as CUDA would count them; there is none here."""

from unittest.mock import Mock

import pytest
import torch
from distributed import Worker

from pipeline.teacher.workers import devices
from pipeline.teacher.workers.devices import visible_devices, worker_count, writer_count
from pipeline.teacher.workers.worker import TeacherPlugin


@pytest.fixture
def gpus(monkeypatch):
    """Let torch find so many, and the environment list others."""

    def pretend(count: int, listed: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        if listed is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)

    return pretend


@pytest.mark.parametrize(
    ("count", "listed", "expected"),
    [
        (2, None, ("0", "1")),
        (2, "", ("0", "1")),
        (2, "5,3", ("5", "3")),
        (1, "GPU-8932f937, 3", ("GPU-8932f937",)),
        (0, None, ()),
    ],
)
def test_gpus_are_named_as_this_process_was_given_them(gpus, count, listed, expected):
    gpus(count, listed)
    assert visible_devices("cuda") == expected


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "mps"])
def test_a_device_of_its_own_is_shared_out_to_nobody(gpus, device):
    gpus(4)
    assert visible_devices(device) == ()


@pytest.mark.parametrize(
    ("asked", "device", "names", "expected"),
    [
        (0, "cuda", ("0", "1", "2"), 3),
        (2, "cuda", ("0", "1", "2"), 2),
        (8, "cuda", ("0", "1", "2"), 3),
        (0, "cuda:1", (), 1),
        (3, "cuda:1", (), 3),
        (0, "cpu", (), 2),
        (3, "cpu", (), 3),
        (99, "cpu", (), 4),
    ],
)
def test_workers_are_as_many_as_gpus_unless_fewer_are_asked_for(
    monkeypatch, asked, device, names, expected
):
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 4)
    assert worker_count(asked, device, names) == expected


@pytest.mark.parametrize(
    ("asked", "device", "cores", "expected"),
    [(0, "cpu", 16, 1), (3, "cpu", 2, 3), (0, "cuda", 16, 8), (0, "cuda", 4, 3), (0, "cuda", 1, 1)],
)
def test_writers_are_all_cores_but_one_beside_a_gpu(monkeypatch, asked, device, cores, expected):
    monkeypatch.setattr(devices.os, "cpu_count", lambda: cores)
    assert writer_count(asked, torch.device(device)) == expected


def test_each_worker_sees_one_gpu_also_when_it_replaces_another(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5")
    seen = []
    for name in (0, 1, 1):
        plugin = TeacherPlugin("name", b"", "attempt", tmp_path, 0, devices=("7", "5"))
        started = Mock(spec=Worker, address="tcp://127.0.0.1:1")
        started.name = name
        plugin.setup(started)
        seen.append(devices.os.environ["CUDA_VISIBLE_DEVICES"])
    assert seen == ["7", "5", "5"]


@pytest.mark.gpu
def test_torch_finds_the_gpus_that_are_shared_out():
    assert len(visible_devices("cuda")) == torch.cuda.device_count()
