"""What steps found: means over steps, the first that is bad by name, kept over a checkpoint."""

import math

import pytest
import torch

from pipeline.errors import IntegrityError
from pipeline.training.values import StepValues, check_finite, check_scale, means

NAN, INF = float("nan"), float("inf")


def one(value: float) -> torch.Tensor:
    return torch.tensor(value)


def test_micro_batches_are_added_and_steps_averaged():
    values = StepValues()
    values.add(7, {"loss": one(1.0), "output": one(2.0)})
    values.add(7, {"loss": one(0.5), "output": one(1.0)})
    values.add(8, {"loss": one(4.5)})
    found = values.read(lambda tensor: 2 * tensor)
    assert found == {7: {"loss": 3.0, "output": 6.0}, 8: {"loss": 9.0}}
    assert means(found) == {"loss": 6.0, "output": 6.0}
    values.clear()
    assert values.read(lambda tensor: tensor) == {}
    assert means({}) == {}


def test_what_is_not_read_yet_comes_back_as_it_was(tmp_path):
    values, again = StepValues(), StepValues()
    for step in (9, 10):
        values.add(step, {"loss": one(step / 3), "feature": one(step / 7)})
    values.save(tmp_path / "a")
    again.load(tmp_path / "a", torch.device("cpu"))
    assert again.read(lambda tensor: tensor) == values.read(lambda tensor: tensor)
    assert list(again.read(lambda tensor: tensor)) == [9, 10]
    again.clear()
    again.save(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    values.load(tmp_path / "none", torch.device("cpu"))
    assert values.read(lambda tensor: tensor) == {}


def test_gradients_that_fit_into_no_scale_of_float16_stop_a_run():
    check_scale(None, "train x", 2)
    check_scale(torch.amp.GradScaler("cpu", init_scale=2.0**-8), "train x", 2)
    with pytest.raises(IntegrityError, match="not finite in float16 at any scale, at step 2; set"):
        check_scale(torch.amp.GradScaler("cpu", init_scale=2.0**-9), "train x", 2)


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"feature": NAN, "loss": NAN, "gradient": NAN},
         "the feature term is nan at step 3; lower learning_rate or the weight of feature, then"),
        ({"feature": INF, "output": NAN, "loss": NAN},
         "the feature term is inf and the output term is nan at step 3"),
        ({"loss": -INF, "gradient": NAN}, "the loss is -inf at step 3; lower learning_rate, then"),
        ({"gradient": INF}, "the loss is finite and its gradient's norm is inf at step 3"),
    ],
    ids=["a term", "two terms", "the loss", "the gradient"],
)  # fmt: skip
def test_the_first_step_that_is_bad_says_what_began_it(bad, said):
    fine = {"loss": 1.0, "feature": 1.0, "output": 1.0, "gradient": 1.0}
    worse = dict.fromkeys(fine, math.nan)
    check_finite({1: fine, 2: fine}, "train x")
    with pytest.raises(IntegrityError, match=f"^train x: {said}"):
        check_finite({4: worse, 3: fine | bad, 2: fine}, "train x")
