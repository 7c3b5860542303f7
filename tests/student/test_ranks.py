"""Two processes train what one process trains with batches of twice the size."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.student.align.objective import Objective
from tests.captured import Captured, prepared
from tests.student.runs import GOAL, SIGNALS, WITH_DROPOUT, curve, equal, run, train_on_two_ranks

ALL = GOAL.model_dump(mode="json")
CASES: dict[str, dict[str, Any]] = {
    # 14 ragged examples: global batches of 4, 4, 3 and 3, two a step.
    "all terms": {"options": {"steps": 5}, "gradient_norms": True},
    # Global batches of 7: one rank has two micro-batches, the other one.
    "micro-batches": {
        "options": {"steps": 4, "batch_size": 4, "gradient_accumulation_steps": 1},
        "micro_batch_size": 3,
    },
    "phases, checkpointing": {
        "objective": ALL
        | {"phases": {"features": 0.5}, "balance": "gradient_norm", "balance_every": 1},
        "options": {"steps": 4, "gradient_checkpointing": True},
    },
}
DROPOUT = {"objective": ALL, "architecture": WITH_DROPOUT}
"""Masks are drawn by each process, so there is no one process that draws the same."""


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Captured:
    found = prepared(tmp_path_factory.mktemp("ranks"), "llama")
    found.capture(SIGNALS, blocks=[1, 2, 3])
    return found


@pytest.fixture(scope="module")
def two(store, tmp_path_factory) -> Path:
    """All cases in one pair of processes: what takes long is to start them."""
    root = tmp_path_factory.mktemp("two")
    cases = {name: {"objective": ALL} | case for name, case in CASES.items()}
    cases["undisturbed"] = DROPOUT
    cases["interrupted"] = DROPOUT | {"interrupt": 5}
    cases["told to end"] = DROPOUT | {"signal": 4, "options": {"save_every": 200}}
    train_on_two_ranks(store, root, cases)
    return root


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(root / "student" / "model.safetensors")


@pytest.mark.parametrize("name", CASES)
def test_two_processes_have_the_curve_of_one(name, store, two, tmp_path):
    case = {"objective": ALL} | CASES[name]
    case["objective"] = Objective.model_validate(case["objective"])
    options = {"batch_size": 2} | case["options"]
    options["batch_size"] *= 2
    run(store, tmp_path, **{**case, "options": options, "micro_batch_size": 0})
    ours, theirs = curve(two / name), curve(tmp_path)
    assert len(ours) == options["steps"]
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for key in one:
            near = 1e-4 if name == "all terms" else 1e-3
            assert one[key] == pytest.approx(other[key], rel=near), key
    expected = weights(tmp_path)
    for key, value in weights(two / name).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=5e-5)


@pytest.mark.parametrize("name", ["interrupted", "told to end"])
def test_an_interrupted_run_ends_with_the_same_bits(name, two):
    assert equal(weights(two / name), weights(two / "undisturbed"))
    assert curve(two / name) == curve(two / "undisturbed")
    assert not list((two / name / "work" / "train").glob("*/checkpoint-*"))
