"""A GPU by its number is the only one that a training sees."""

import os

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.runtime import Runtime
from stages.project import on_one_gpu


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5")


@pytest.mark.usefixtures("two_gpus")
def test_a_gpu_by_number_is_the_only_one_that_is_seen():
    assert on_one_gpu(Runtime(device="cuda:1")).device == "cuda"
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "5"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("device", ["auto", "cpu", "cuda"])
def test_other_devices_hide_nothing(device):
    assert on_one_gpu(Runtime(device=device)).device == device
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "7,5"


@pytest.mark.usefixtures("two_gpus")
@pytest.mark.parametrize("device", ["cuda:2", "cuda:x"])
def test_a_gpu_that_is_not_there_is_refused(device):
    with pytest.raises(ConfigError, match=f"device '{device}': found 2 GPUs, expected the number"):
        on_one_gpu(Runtime(device=device))
