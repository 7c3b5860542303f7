"""What `Trainer` is told, and what is refused before a model is built."""

import pytest

from pipeline.errors import ConfigError
from pipeline.training import arguments
from pipeline.training.arguments import check_options, training_arguments
from pipeline.training.options import TrainOptions


def test_options_mean_what_they_say(tmp_path):
    options = TrainOptions(
        steps=40, batch_size=3, gradient_accumulation_steps=2, warmup=0.25, seed=7,
        gradient_checkpointing=True, max_grad_norm=0.5,
    )  # fmt: skip
    found = training_arguments(options, tmp_path, "cpu")
    assert (found.max_steps, found.per_device_train_batch_size) == (40, 3)
    assert found.get_warmup_steps(40) == 10
    assert found.activation_checkpointing_kwargs == {"use_reentrant": False}
    assert (found.seed, found.max_grad_norm, found.report_to) == (7, 0.5, [])
    assert (found.optim, found.bf16, found.fp16) == ("adamw_torch_fused", False, False)


def test_half_precisions_and_optimisers_are_those_of_trainer(tmp_path):
    found = [
        training_arguments(TrainOptions(precision=precision, optimizer=name), tmp_path, "cpu")
        for precision, name in (("bfloat16", "adafactor"), ("float16", "adamw_8bit"))
    ]
    assert [(one.bf16, one.fp16) for one in found] == [(True, False), (False, True)]
    assert [one.optim for one in found] == ["adafactor", "adamw_bnb_8bit"]


def test_float16_needs_cuda():
    options = TrainOptions(precision="float16")
    check_options(options, "cuda:1", key="students.a.train")
    with pytest.raises(ConfigError, match=r"students.a.train.precision: float16 on cpu, expected"):
        check_options(options, "cpu", key="students.a.train")
    check_options(TrainOptions(precision="bfloat16"), "cpu", key="students.a.train")


def test_an_optimiser_whose_package_is_missing_is_refused(monkeypatch):
    check_options(TrainOptions(optimizer="adafactor"), "cpu", key="teachers.t.fit")
    monkeypatch.setattr(arguments, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r"fit.optimizer: .*pip install 'decant-kd\[quantized\]'"):
        check_options(TrainOptions(optimizer="adamw_8bit"), "cpu", key="teachers.t.fit")
