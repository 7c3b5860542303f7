"""Students side by side: each becomes what it becomes alone, and the store is read once."""

import logging
import threading
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.errors import ConfigError
from pipeline.store.reader import StoreReader
from pipeline.student.align.objective import Objective
from pipeline.student.loop.random_state import RandomState
from pipeline.student.loop.together import take_turns, train_together
from pipeline.student.loop.train import train_student
from pipeline.student.loop.training import Training
from tests.captured import Captured, prepared
from tests.student.runs import (
    GOAL,
    SIGNALS,
    WITH_DROPOUT,
    InterruptedRunError,
    after_each_step,
    curve,
    equal,
    training_of,
)

Walk = Generator[float, None, None]
PHASED = GOAL.model_dump(mode="json") | {"phases": {"features": 0.5}}
STUDENTS: dict[str, dict[str, Any]] = {
    "aligned": {},
    "short": {
        "objective": Objective.model_validate({"labels": {"weight": 1.0}}),
        "options": {"steps": 5, "batch_size": 3, "gradient_accumulation_steps": 1},
    },
    "phased": {
        "objective": Objective.model_validate(PHASED),
        "options": {"batch_size": 4, "gradient_accumulation_steps": 1, "save_every": 4},
    },
}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("together"), "llama")
    found.capture(SIGNALS, blocks=[1, 2, 3])
    return found


def trainings(store: Captured, root: Path, names: Any = tuple(STUDENTS)) -> list[Training]:
    return [
        training_of(store, root / name, name=name, architecture=WITH_DROPOUT, **STUDENTS[name])
        for name in names
    ]


def weights(root: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(root / name / "student" / "model.safetensors")


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("alone")
    for one in trainings(store, root):
        train_student(one)
    return root


def check_as_alone(root: Path, alone: Path, names: Any = tuple(STUDENTS)) -> None:
    for name in names:
        assert equal(weights(root, name), weights(alone, name)), name
        assert curve(root / name) == curve(alone / name), name


def left_threads() -> set[str]:
    left = {thread.name.split("_")[0] for thread in threading.enumerate()}
    return left & {"segment-reader", "batch-builder"}


def test_each_becomes_what_it_becomes_alone(store, alone, tmp_path):
    """Dropout, other batches, other terms, fewer steps, phases."""
    train_together(trainings(store, tmp_path))
    check_as_alone(tmp_path, alone)
    assert not left_threads()


def test_they_go_on_after_an_interrupt_to_the_same_bits(store, alone, tmp_path, monkeypatch):
    """The ninth step of all is the last one; each has begun, one had no checkpoint yet."""
    steps: list[Any] = []

    def count(student: str, _: int) -> None:
        steps.append(student)
        if len(steps) == 9:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        after_each_step(patch, count)
        with pytest.raises(KeyboardInterrupt):
            train_together(trainings(store, tmp_path))
    assert len(steps) == 9
    assert len(set(steps)) == 3
    assert not left_threads()
    assert not list(tmp_path.glob("*/student"))
    assert list(tmp_path.glob("*/work/train/*/checkpoint-*"))
    train_together(trainings(store, tmp_path))
    check_as_alone(tmp_path, alone)


def test_an_error_of_one_leaves_the_others_to_go_on(store, alone, tmp_path, monkeypatch, caplog):
    def fail(student: str, step: int) -> None:
        if (student, step) == ("train short", 2):
            raise InterruptedRunError("no more")

    after_each_step(monkeypatch, fail)
    with (
        caplog.at_level(logging.INFO, logger="pipeline.student.loop.together"),
        pytest.raises(InterruptedRunError),
    ):
        train_together(trainings(store, tmp_path))
    check_as_alone(tmp_path, alone, ["aligned", "phased"])
    assert "short was not trained: no more" in caplog.messages
    assert "trained: aligned, phased" in caplog.messages
    assert not (tmp_path / "short" / "student").exists()


def test_a_segment_is_read_once_for_all(store, tmp_path, monkeypatch):
    reads: Counter[int] = Counter()
    plain = StoreReader.read_segment

    def counted(self, number, *more):
        reads[number] += 1
        return plain(self, number, *more)

    monkeypatch.setattr(StoreReader, "read_segment", counted)
    one_epoch = {"steps": 7, "batch_size": 2, "gradient_accumulation_steps": 1}
    both = [training_of(store, tmp_path / name, name=name, options=one_epoch) for name in "ab"]
    train_together(both)
    assert set(reads.values()) == {1}
    assert len(reads) == len(store.reader.segments("train"))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"options": {"precision": "bfloat16"}}, "more than one precision .*float32.*bfloat16"),
        ({"selected": {"store": "other", "signals": {}}}, "more than one store .*other"),
        ({"report_to": ("mlflow",)}, "found report_to mlflow, .*tensorboard or dvclive"),
    ],
    ids=["precision", "store", "reporter"],
)
def test_what_cannot_go_side_by_side_is_refused_before_anything(change, match, store, tmp_path):
    apart = training_of(store, tmp_path / "apart", name="apart", **change)
    with pytest.raises(ConfigError, match=match):
        train_together([*trainings(store, tmp_path, ["aligned"]), apart])
    assert not list(tmp_path.iterdir())


def test_a_line_says_that_segments_are_not_shared(store, tmp_path, caplog):
    options = {"steps": 1, "save_every": 100}
    pair = [
        training_of(store, tmp_path / str(n), name=f"s{n}", options=options | {"seed": n})
        for n in range(2)
    ]
    with caplog.at_level(logging.INFO, logger="pipeline.student.loop.together"):
        train_together(pair)
    assert [line for line in caplog.messages if "segments are not read once for all" in line]


def test_the_turn_is_for_who_is_least_far():
    """Batches of 2, 3 and 6 of 12 examples: a turn is one batch."""
    turns_taken = []

    def walk(number: int, size: int) -> Walk:
        for done in range(size, 12 + size, size):
            turns_taken.append(number)
            yield done / 12

    walks = [walk(number, size) for number, size in enumerate((2, 3, 6))]
    assert take_turns(walks, [RandomState.now()] * 3) == [None] * 3
    assert turns_taken == [0, 1, 2, 0, 1, 0, 0, 1, 2, 0, 1, 0]


def test_each_one_finds_its_random_state_again():
    drawn: dict[int, list[float]] = {0: [], 1: []}
    states = []
    for seed in drawn:
        torch.manual_seed(seed)
        states.append(RandomState.now())

    def draw(number: int) -> Walk:
        for done in range(1, 5):
            drawn[number].append(float(torch.rand(())))
            yield done

    take_turns([draw(n) for n in drawn], states)
    for seed, found in drawn.items():
        torch.manual_seed(seed)
        assert found == [float(torch.rand(())) for _ in range(4)]


def test_an_interrupt_of_one_ends_the_others_where_they_are():
    far, ended = [0, 0, 0], []

    def walk(number: int) -> Walk:
        try:
            far[number] += 1
            yield far[number]
            if number == 1:
                raise KeyboardInterrupt
            far[number] += 1
            yield far[number]
            raise AssertionError("no third turn")
        finally:
            ended.append(number)

    with pytest.raises(KeyboardInterrupt):
        take_turns([walk(number) for number in range(3)], [RandomState.now()] * 3)
    assert ended == [1, 0, 2]
    assert far == [2, 1, 1]


def test_who_fails_is_named_and_the_others_go_on():
    done: list[int] = []

    def walk(number: int) -> Walk:
        yield 0.0
        if number == 0:
            raise ValueError(number)
        done.append(number)

    errors = take_turns([walk(number) for number in range(2)], [RandomState.now()] * 2)
    assert isinstance(errors[0], ValueError)
    assert (errors[1], done) == (None, [1])
