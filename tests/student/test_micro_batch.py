"""The batch that fits is found before the first step, and a run keeps to it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import ResourceError
from pipeline.provenance import write_json
from pipeline.student.align.distiller import Distiller
from pipeline.student.data.feed import tensors_of
from pipeline.student.loop.micro_batch import Rehearsal, held_bytes, settle_micro_batch
from pipeline.student.loop.random_state import RandomState
from pipeline.student.loop.train import StudentRun
from tests.captured import Captured, prepared
from tests.student.runs import (
    SIGNALS,
    WITH_DROPOUT,
    InterruptedRunError,
    curve,
    equal,
    interrupt,
    train,
    training_of,
)

CPU = torch.device("cpu")
WHOLE = {"options": {"batch_size": 7, "gradient_accumulation_steps": 1, "steps": 4}}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("micro"), "llama")
    found.capture(SIGNALS, blocks=[1, 2, 3])
    return found


@pytest.fixture
def tried(monkeypatch) -> list[tuple[int, int]]:
    """Refuse more than two rows at once, as a GPU does; keep rows and their length."""
    plain = Distiller.forward
    found: list[tuple[int, int]] = []

    def forward(self, batch, *args, **kwargs):
        found.append(tuple(batch["input_ids"].shape))
        if len(batch["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, batch, *args, **kwargs)

    monkeypatch.setattr(Distiller, "forward", forward)
    return found


def settle(fits: Callable[[int], bool], record: Path, batch_size: int = 24) -> int:
    return settle_micro_batch(fits, batch_size, name="tiny", record=record, device=CPU)


def test_it_is_halved_until_it_fits_and_kept(tmp_path, caplog):
    record, tried = tmp_path / "run" / "micro_batch.json", []

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= 7

    with caplog.at_level(logging.INFO):
        assert settle(fits, record) == 6
    assert tried == [24, 12, 6]
    assert caplog.messages == ["tiny: micro-batches of 6 (of 24): what fits"]
    assert settle(fits, record) == 6
    assert tried == [24, 12, 6]


@pytest.mark.parametrize("kept", [{}, {"micro_batch_size": 25}, {"micro_batch_size": "6"}, []])
def test_a_number_that_cannot_be_is_found_again(kept, tmp_path):
    record = tmp_path / "micro_batch.json"
    write_json(record, kept)
    assert settle(lambda size: size < 13, record) == 12


def test_one_example_must_fit(tmp_path):
    with pytest.raises(ResourceError, match=r"students.tiny: not even one example fits .* of cpu"):
        settle(lambda size: False, tmp_path / "micro_batch.json")
    assert not list(tmp_path.iterdir())


def test_what_runs_is_the_longest_row_with_every_term(store, tmp_path, tried):
    run = StudentRun(training_of(store, tmp_path, architecture=WITH_DROPOUT))
    before = {name: value.clone() for name, value in run._distiller.state_dict().items()}
    random = RandomState.now()
    options: dict[str, Any] = {
        "precision": "float32", "is_apart": True, "held_bytes": 8, "waiting": 3
    }  # fmt: skip
    rehearsal = Rehearsal(run._distiller, run._dataset, CPU, **options)
    assert not rehearsal.fits(3)
    assert rehearsal.fits(2)
    assert tried == [(3, 20), (2, 20)]
    assert torch.equal(torch.get_rng_state(), random.torch)
    assert all(p.grad is None for p in run._distiller.parameters())
    assert equal(run._distiller.state_dict(), before)


def test_what_waits_beside_the_batch_takes_its_room(store, tmp_path, monkeypatch):
    run = StudentRun(training_of(store, tmp_path))
    plain, taken = torch.empty, []

    def empty(*size, **kwargs):
        if kwargs.get("dtype") == torch.uint8:
            taken.append(size[0])
        return plain(*size, **kwargs)

    monkeypatch.setattr("pipeline.student.loop.micro_batch.torch.empty", empty)
    found = []
    for waiting in (0, 3):
        rehearsal = Rehearsal(
            run._distiller, run._dataset, CPU, precision="float32", is_apart=False, held_bytes=8,
            waiting=waiting,
        )  # fmt: skip
        assert rehearsal.fits(2)
        found.append(sum(size for size in taken if size > 8))
        del taken[:]
    batch = run._dataset.__getitems__([int(run._dataset.length.argmax())] * 2)
    assert found == [0, 3 * sum(one.nbytes for one in tensors_of(batch))]


def test_another_error_is_not_taken_for_a_lack_of_memory(store, tmp_path, monkeypatch):
    def forward(self, *args, **kwargs):
        raise RuntimeError("shapes do not match")

    run = StudentRun(training_of(store, tmp_path, micro_batch_size="auto"))
    monkeypatch.setattr(Distiller, "forward", forward)
    with pytest.raises(RuntimeError, match="shapes"):
        run.loop()


def test_moments_and_buckets_of_ranks_are_counted(store, tmp_path):
    distiller = StudentRun(training_of(store, tmp_path))._distiller
    trained = sum(p.numel() for p in distiller.parameters())
    assert held_bytes(distiller, ranks=1) == 8 * trained
    assert held_bytes(distiller, ranks=2) == 12 * trained


def test_a_run_that_finds_the_number_is_the_run_that_is_given_it(
    store, tmp_path, tried, monkeypatch
):
    """Of 7: 3 and then 1, because every batch has 7. Also when it was interrupted."""
    changes = {"architecture": WITH_DROPOUT, **WHOLE}
    given = train(store, tmp_path / "given", micro_batch_size=1, **changes)
    assert max(tried) == (1, 20)
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        with pytest.raises(InterruptedRunError):
            train(store, tmp_path / "auto", micro_batch_size="auto", **changes)
    del tried[:]
    assert equal(train(store, tmp_path / "auto", micro_batch_size="auto", **changes), given)
    assert curve(tmp_path / "auto") == curve(tmp_path / "given")
    assert {rows for rows, _ in tried} == {1}


def test_without_room_for_a_batch_the_error_says_what_helps(store, tmp_path, tried):
    with pytest.raises(ResourceError, match=r"micro-batches of 7; set micro_batch_size to auto"):
        train(store, tmp_path, **WHOLE)
    with pytest.raises(ResourceError, match=r"of 3; set micro_batch_size to auto"):
        train(store, tmp_path, micro_batch_size=3, **WHOLE)
