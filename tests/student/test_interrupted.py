"""Ctrl-C or SIGTERM in a training: a checkpoint is written first, and no step is lost."""

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from pipeline.errors import Interrupted
from pipeline.student.loop.together import train_together
from pipeline.student.loop.training import Training
from pipeline.training import interrupts
from pipeline.training.checkpoints import MARKER
from tests.captured import Captured, prepared
from tests.student.runs import (
    SIGNALS,
    WITH_DROPOUT,
    after_each_checkpoint,
    curve,
    equal,
    send,
    train,
    training_of,
)

RARELY = {"save_every": 200, "log_every": 2}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("interrupted"), "llama")
    found.capture(SIGNALS, blocks=[1, 2, 3])
    return found


@pytest.fixture(scope="module")
def whole(store, tmp_path_factory) -> tuple[Path, dict]:
    """A run that nobody interrupts."""
    root = tmp_path_factory.mktemp("whole")
    return root, train(store, root, options=dict(RARELY), architecture=WITH_DROPOUT)


@pytest.fixture(autouse=True)
def _interruptible():
    """A shell starts a program in the background with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def checkpoints(root: Path) -> list[str]:
    return [path.parent.name for path in root.glob(f"work/train/*/checkpoint-*/{MARKER}")]


@pytest.mark.parametrize(
    ("step", "number", "code"),
    [(1, signal.SIGINT, 130), (5, signal.SIGTERM, 143), (9, signal.SIGINT, 130)],
)
def test_it_goes_on_from_the_step_of_the_interrupt(
    step, number, code, store, whole, tmp_path, monkeypatch
):
    handlers = [signal.getsignal(one) for one in interrupts.SIGNALS]
    case = {"options": RARELY, "architecture": WITH_DROPOUT}
    with monkeypatch.context() as patch:
        # A terminal and a launcher may both send it.
        send(patch, step, number, number)
        with pytest.raises(Interrupted, match=f"goes on from the checkpoint of step {step}") as e:
            train(store, tmp_path, **{key: dict(value) for key, value in case.items()})
    assert e.value.exit_code == code
    assert checkpoints(tmp_path) == [f"checkpoint-{step}"]
    assert not (tmp_path / "student").exists()
    assert [signal.getsignal(one) for one in interrupts.SIGNALS] == handlers
    root, expected = whole
    assert equal(train(store, tmp_path, **case), expected)
    assert curve(tmp_path) == curve(root)


def test_a_second_interrupt_ends_at_once(store, tmp_path, monkeypatch):
    monkeypatch.setattr(interrupts, "APART_SECONDS", 0.0)
    send(monkeypatch, 2, signal.SIGTERM, signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as raised:
        train(store, tmp_path, options=dict(RARELY))
    assert not isinstance(raised.value, Interrupted)
    assert checkpoints(tmp_path) == []


def test_several_students_each_write_a_checkpoint(store, tmp_path, monkeypatch):
    def trainings(root: Path) -> list[Training]:
        rates = {"one": 1e-2, "two": 2e-2, "three": 3e-2}
        return [
            training_of(store, root / name, name=name, options=RARELY | {"learning_rate": rate})
            for name, rate in rates.items()
        ]

    train_together(trainings(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        send(patch, 3, signal.SIGINT)
        # The first of them reaches its third step before the others do.
        with pytest.raises(Interrupted):
            train_together(trainings(tmp_path / "again"))
    for name in ("one", "two", "three"):
        (found,) = checkpoints(tmp_path / "again" / name)
        assert found in ("checkpoint-2", "checkpoint-3")
        assert not (tmp_path / "again" / name / "student").exists()
    train_together(trainings(tmp_path / "again"))
    for name in ("one", "two", "three"):
        weights = [
            tmp_path / run / name / "student/model.safetensors" for run in ("whole", "again")
        ]
        assert weights[0].read_bytes() == weights[1].read_bytes()
        assert curve(tmp_path / "whole" / name) == curve(tmp_path / "again" / name)


def test_a_clock_that_is_set_back_costs_no_checkpoint(store, whole, tmp_path, monkeypatch):
    """Who goes by the time of writing removes the newest one as it is written."""

    def later(checkpoint: Path) -> None:
        tomorrow = time.time() + 86_400 - int(checkpoint.name.removeprefix("checkpoint-"))
        os.utime(checkpoint, (tomorrow, tomorrow))

    case = {"options": RARELY | {"save_every": 1}, "architecture": WITH_DROPOUT}
    with monkeypatch.context() as patch:
        after_each_checkpoint(patch, later)
        send(patch, 5, signal.SIGINT)
        with pytest.raises(Interrupted):
            train(store, tmp_path, **{key: dict(value) for key, value in case.items()})
    assert sorted(checkpoints(tmp_path)) == ["checkpoint-4", "checkpoint-5"]
    assert equal(train(store, tmp_path, **case), whole[1])


@pytest.mark.parametrize(("size", "threads"), [(0, 2), (1, 1), (3, 1)])
def test_it_goes_on_with_other_threads_and_micro_batches(
    size, threads, store, tmp_path, monkeypatch, caplog
):
    """They are no part of what the student becomes; sums are rounded otherwise."""
    caplog.set_level("INFO")
    before = torch.get_num_threads()
    expected = train(store, tmp_path / "whole", options=dict(RARELY))
    with monkeypatch.context() as patch:
        send(patch, 4, signal.SIGINT)
        with pytest.raises(Interrupted):
            train(store, tmp_path, options=dict(RARELY))
    try:
        torch.set_num_threads(threads)
        found = train(store, tmp_path, options=dict(RARELY), micro_batch_size=size)
    finally:
        torch.set_num_threads(before)
    (line,) = [one for one in caplog.messages if "resuming from" in one]
    assert line.endswith("checkpoint-4")
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=1e-5)
