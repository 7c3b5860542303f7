"""The arms train on one and the same; what `make bench` keeps and draws. Nothing is timed."""

import json
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner
from matplotlib import image

from benchmarks import plot, results, train
from benchmarks.cold import drop, resident
from benchmarks.rivals import RIVALS, plain_samples
from benchmarks.train import ARMS, check, figures, present, table
from benchmarks.train_arms import Arm, Plan, Setting
from benchmarks.turns import interleaved
from pipeline.store.reader import StoreReader
from tests.captured import prepared, signal

SIGNALS = [
    signal("hidden", 0, "int8"),
    signal("hidden", 3, "int8"),
    signal("attention", 3, "qk"),
    signal("logits", None, "head"),
]


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    prepared(root, "llama").capture(SIGNALS)
    setting = Setting(str(root), "cpu", {"0": 0, "1": 3}, 16, 2, 2, 0)
    reader = StoreReader(setting.store)
    plan = Plan(reader, setting)
    for name in present(RIVALS):
        (root / name).mkdir()
        RIVALS[name].write(root / name, plain_samples(reader, plan.dataset), plan.batches)
    return setting


@pytest.fixture(scope="module")
def arms(setting):
    return {name: Arm(name, setting) for name in present(ARMS)}


def test_every_arm_has_the_batches_features_and_losses_of_the_store(setting, arms):
    errors = check(arms, Path(setting.root))
    assert errors["store"] == errors["reading"] == errors["ram"] == 0
    assert all(0 < errors[name] < 1e-3 for name in present(RIVALS))
    assert 1e-3 < errors["live"] == errors["teacher"]


def test_an_arm_with_other_rows_is_not_timed(setting, arms):
    (path,) = Path(setting.root, "memmap").glob("hidden+3*")
    kept = np.load(path)
    np.save(path, kept[::-1])
    with pytest.raises(click.ClickException, match="memmap: features differ"):
        check({name: arms[name] for name in ("store", "memmap")}, Path(setting.root))
    np.save(path, kept)


def test_laps_are_steps_and_a_cold_one_has_let_go_of_its_files(arms):
    some = {name: arms[name] for name in ("store", "memmap", "teacher", "reading")}
    warm = interleaved(some, 1, warm_up=0)
    assert all(own[0]["seconds"] > 0 for own in warm.values())
    cold = interleaved({"store": arms["store"], "memmap": arms["memmap"]}, 1, "cold", warm_up=0)
    assert all(0 <= own[0]["resident_share"] <= 1 for own in cold.values())


def test_reading_takes_no_step_and_ends_when_the_next_lap_can_begin(setting, monkeypatch):
    arm = Arm("reading", setting)
    monkeypatch.setattr(arm, "_step", None)
    arm.ask("lap")
    table, held = arm._plan.dataset._timetable, arm._plan.dataset._held
    assert set(table.segments[: table.together].tolist()) <= set(held)
    assert all(segment.done() for segment in held.values())
    arm.close()


def test_pages_are_counted(tmp_path):
    empty, short = tmp_path / "empty", tmp_path / "short"
    empty.write_bytes(b"")
    short.write_bytes(b"x" * 5000)
    assert resident(empty) == (0, 0)
    assert resident(short)[1] == 2
    assert 0 <= drop([empty, short]) <= 1


@pytest.mark.slow
def test_the_benchmark_gives_a_table_and_a_json_line(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "loss_figures", lambda *, quick: {"loss_peak_over_full": 1.0})
    sizes = ["--tokens=512", "--length=32", "--batch-size=4", "--width=48", "--vocab=64"]
    sizes += ["--layers=3", "--student-width=24", "--workers=0", "--laps=1", "--cold-laps=1"]
    result = CliRunner().invoke(train.main, [*sizes, f"--results={tmp_path}"])
    assert result.exit_code == 0, result.output
    *shown, line = result.stdout.strip().splitlines()
    assert any("ours, from the store" in row for row in shown)
    found = json.loads(line)["figures"]
    wanted = ("step_over_ram", "step_over_memmap", "cold_step_over_ram", "loss_peak_over_full")
    assert all(found[key] > 0 for key in (*wanted, "live_speedup_over_possible"))
    kept = results.read("train", tmp_path)["figures"]
    assert kept["steps"] == found["steps"]


def laps(seconds):
    return [{"seconds": s, "cpu_seconds": 2 * s, "resident_share": 0.0} for s in seconds]


def test_figures_are_ratios_turn_by_turn():
    warm = {name: laps([2.0, 4.0, 6.0]) for name in ARMS}
    warm["store"] = laps([2.2, 4.0, 6.0])
    warm["live"], warm["teacher"] = laps([4.0, 8.0, 12.0]), laps([2.0, 4.0, 6.0])
    cold = {name: laps([3.0]) for name in ("ram", "store", *RIVALS)}
    found = figures(warm, cold, 2, {"store": 1.0, **dict.fromkeys(RIVALS, 2.0)})
    assert found["step_over_ram"] == found["step_over_memmap"] == 1
    assert found["store_seconds_over_ram"]["most"] == pytest.approx(1.1)
    assert found["live_speedup_possible"]["median"] == 2
    assert found["live_speedup_over_possible"] == 1
    assert found["live_speedup_over_possible_spread"]["least"] == pytest.approx(1 / 1.1)
    assert found["ram_step_seconds"]["median"] == 2
    assert found["reading_over_ram"] == found["reading_seconds_over_ram"]["median"] == 1
    assert table(found, list(ARMS)).row_count == len(ARMS)


def test_results_have_one_order_and_four_digits(tmp_path):
    path = results.write("train", {"b": 1.23456, "a": {"c": [3, 0.1 + 0.2]}}, tmp_path)
    text = path.read_text()
    assert text.index('"a"') < text.index('"b"') < text.index('"machine"')
    found = results.read("train", tmp_path)
    assert found["figures"] == {"a": {"c": [3, 0.3]}, "b": 1.235}
    assert "torch" in found["machine"]
    assert results.write("train", found["figures"], tmp_path).read_text() == text
    assert results.read("other", tmp_path) is None


def test_results_are_drawn(tmp_path):
    assert not plot.draw(tmp_path, tmp_path / "none.png")
    spread = {"median": 1.0, "least": 0.9, "most": 1.1}
    far = {"median": 30.0, "least": 29.0, "most": 31.0}
    train = {f"{name}_seconds_over_ram": spread for name in plot.STEP}
    results.write("train", train | {"zarr_dask_seconds_over_ram": far}, tmp_path)
    assert plot.draw(tmp_path, tmp_path / "one.png")
    results.write("capture", {"ours_head_wall_over_forward": spread}, tmp_path)
    assert plot.draw(tmp_path, tmp_path / "two.png")
    one, two = (image.imread(tmp_path / f"{name}.png") for name in ("one", "two"))
    assert one.shape[1] == two.shape[1] == 1400
    assert one.shape[0] < two.shape[0]
