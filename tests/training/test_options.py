"""What is refused before a model is built."""

import pytest

from pipeline.errors import ConfigError
from pipeline.training import options
from pipeline.training.options import TrainOptions, check_options


def test_float16_needs_cuda():
    half = TrainOptions(precision="float16")
    check_options(half, "cuda:1", key="students.a.train")
    check_options(half, None, key="students.a.train")
    with pytest.raises(ConfigError, match=r"students.a.train.precision: float16 on cpu, expected"):
        check_options(half, "cpu", key="students.a.train")
    check_options(TrainOptions(precision="bfloat16"), "cpu", key="students.a.train")


def test_an_optimiser_whose_package_is_missing_is_refused(monkeypatch):
    check_options(TrainOptions(optimizer="adafactor"), "cpu", key="teachers.t.fit")
    monkeypatch.setattr(options, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"fit.optimizer: .*pip install 'decant-kd\[quantized\]'"):
        check_options(TrainOptions(optimizer="adamw_8bit"), "cpu", key="teachers.t.fit")
