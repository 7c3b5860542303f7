import numpy as np
import pytest
from scipy.stats import ttest_1samp

from benchmarks.shuffling import WHOLE, compare, dealing, difficulty
from pipeline.axes import SPLITS, TRAIN
from pipeline.teacher.capture.token_rows import plan_rows
from tests.captured import OPTIONS, write_rows


def run(arm, seed, loss):
    return {"arm": arm, "seed": seed, "test_loss": loss, "test_kl": 2 * loss}


def test_differences_are_of_the_same_seed():
    whole = [run(WHOLE.name, seed, loss) for seed, loss in enumerate((1.0, 2.0, 3.0))]
    four = [run("4 segments", seed, loss) for seed, loss in enumerate((1.1, 2.3, 3.2))]
    rows = compare([*reversed(four), run("4 segments", 7, 9.0), *whole])
    assert [row["arm"] for row in rows] == [WHOLE.name, "4 segments"]
    assert (rows[0]["test_loss_over_all"], rows[0]["test_loss_interval"]) == (0, 0)
    assert rows[1]["test_loss_over_all"] == pytest.approx(0.2)
    assert rows[1]["test_kl"] == pytest.approx(2 * rows[1]["test_loss"])
    assert "test_accuracy" not in rows[1]


def test_the_interval_is_that_of_a_paired_t_test():
    differences = np.array([0.1, 0.3, 0.2])
    runs = [
        run(arm, seed, 1.0 + found)
        for arm, values in ((WHOLE.name, np.zeros(3)), ("1 segment", differences))
        for seed, found in enumerate(values)
    ]
    row = compare(runs)[1]
    low, high = ttest_1samp(differences, 0).confidence_interval(0.95)
    assert row["test_loss_over_all"] - row["test_loss_interval"] == pytest.approx(low)
    assert row["test_loss_over_all"] + row["test_loss_interval"] == pytest.approx(high)


def test_one_seed_has_no_interval():
    row = compare([run(WHOLE.name, 0, 1.0), run("1 segment", 0, 1.5)])[1]
    assert (row["test_loss_over_all"], row["test_loss_interval"]) == (0.5, None)


@pytest.mark.parametrize("task", ["classification", "causal-lm"])
def test_all_ways_to_deal_have_the_same_rows(tmp_path, task):
    tokens = write_rows(tmp_path, task=task)
    dealt = {}
    for way in ("as captured", "anew", "sorted"):
        with dealing(tokens, way):
            dealt[way] = plan_rows(tokens, OPTIONS)
    assert np.array_equal(dealt["as captured"].row, plan_rows(tokens, OPTIONS).row)
    rows = {way: plan.row[plan.split == SPLITS.index(TRAIN)] for way, plan in dealt.items()}
    for way in ("anew", "sorted"):
        assert sorted(rows[way]) == sorted(rows["as captured"])
        assert list(rows[way]) != list(rows["as captured"])
    assert (np.diff(difficulty(tokens)[rows["sorted"]]) >= 0).all()
