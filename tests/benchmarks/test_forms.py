"""The sweep over forms: an arm changes what it says alone, and ratios are seed by seed."""

import json

import pytest
from click.testing import CliRunner

from benchmarks.form_arms import DENSE, arms
from benchmarks.form_bytes import large_vocabulary
from benchmarks.forms import compare, figures, main
from pipeline.student.align.objective import Alignment, Objective
from tests.faults.small_project import small_project

SIZES = {"student_layers": 3, "teacher_layers": 6}
OBJECTIVE = Objective.model_validate(
    {term: {"weight": 1.0} for term in ("feature", "attention", "output")}
)


def names(arm, task):
    found = arm.signals(Alignment(), task=task, **SIZES)
    assert len({signal.name for signal in found}) == len(found)
    return {signal.name.split("-")[0] for signal in found}


@pytest.mark.parametrize("task", ["causal-lm", "classification"])
def test_every_arm_is_asked_for_once_and_dense_is_first(task):
    every = arms(task=task, **SIZES)
    assert every[0] == DENSE
    assert len({arm.name for arm in every}) == len(every)
    assert (
        len({arm.objective(OBJECTIVE).model_dump_json() + str(names(arm, task)) for arm in every})
        > 9
    )


def test_dense_has_what_below_needs():
    assert names(DENSE, "causal-lm") == {
        *(f"hidden/{layer}/float16" for layer in range(7)),
        *(f"attention/{layer}/below" for layer in (2, 4, 6)),
        "logits/head",
    }


def test_an_arm_changes_its_own_kind_alone():
    dense = names(DENSE, "causal-lm")
    for arm in arms(task="causal-lm", **SIZES):
        if arm.about in ("hidden", "attention", "logits"):
            gone = {name.split("/")[0] for name in dense - names(arm, "causal-lm")}
            assert gone <= ({"hidden", "attention"} if arm.about == "attention" else {arm.about})
        objective = arm.objective(OBJECTIVE)
        for term in ("feature", "attention", "output", "labels"):
            assert getattr(objective, term).weight.is_off == (term in (*arm.without, "labels"))


def run(arm, seed, loss):
    return {"arm": arm, "seed": seed, "test_loss": loss, "test_kl": loss / 2, "bytes_per_token": {}}


def test_ratios_are_of_the_same_seed():
    runs = [run("dense", 0, 1.0), run("dense", 1, 2.0), run("int8", 1, 2.2), run("int8", 0, 1.1)]
    dense, int8 = compare([*runs, run("int8", 7, 9.0)])
    assert (dense["test_loss_over_dense"], dense["test_loss_spread"]) == (1, 0)
    assert int8["test_loss_over_dense"] == pytest.approx(1.1)
    assert int8["test_loss_spread"] == pytest.approx(0, abs=1e-12)
    assert (int8["seeds"], int8["test_kl"]) == (2, pytest.approx(0.825))
    assert figures([dense, int8]) == {"dense": 1, "int8": 1.1}


def test_few_ids_are_few_bytes_of_a_large_vocabulary():
    found = large_vocabulary(16, vocab=100_000)
    assert all(row["over_dense"] < row["target"] for row in found if "256" not in row["form"])


@pytest.mark.slow
def test_a_sweep_goes_on_and_its_table_is_shown_again(tmp_path, monkeypatch):
    small_project(tmp_path).parameters()
    monkeypatch.chdir(tmp_path)

    def said(*arguments: str) -> dict:
        result = CliRunner().invoke(main, arguments, catch_exceptions=False)
        assert result.exit_code == 0
        return json.loads(result.stdout.splitlines()[-1])

    first = said("--quick")
    assert set(first["figures"]) == {"dense", "int8 + qk", "hidden int8"}
    assert first["figures"]["dense"] == 1
    for row in first["rows"]:
        assert 0 < row["test_loss"] < 20
        assert row["bytes_per_token"]["hidden"] > 0
    runs = tmp_path / "data/work/forms/runs"
    written = {path: path.stat().st_mtime_ns for path in runs.iterdir()}
    assert said("--quick") == first
    assert {path: path.stat().st_mtime_ns for path in runs.iterdir()} == written
    assert said("--table", str(runs))["rows"] == first["rows"]
    sizes = said("--bytes")["figures"]
    assert sizes["hidden int4 group=64"] < sizes["hidden int8"] < sizes["hidden float16"]
    assert sizes["attention below"] == 0
