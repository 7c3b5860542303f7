import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.student.align.chunked import chunked_feature_loss
from pipeline.student.align.distiller import Projectors
from pipeline.student.align.projectors import linear


def build(seed: int) -> Projectors:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Projectors("linear", {2: 4, 0: 0, 1: 2}, d_student=3, d_teacher=5)


def test_each_pair_has_a_projector_of_its_own():
    projectors = build(0)
    assert list(projectors.by_pair) == ["0->0", "1->2", "2->4"]
    hidden = torch.ones(7, 3)
    first, second = projectors.of(1)(hidden), projectors.of(2)(hidden)
    assert first.shape == (7, 5)
    assert not torch.equal(first, second)
    weights = projectors.state_dict()
    torch.testing.assert_close(
        first,
        hidden @ weights["by_pair.1->2.linear.weight"].T + weights["by_pair.1->2.linear.bias"],
    )
    first.sum().backward()
    assert projectors.get_parameter("by_pair.1->2.linear.weight").grad is not None
    assert projectors.get_parameter("by_pair.2->4.linear.weight").grad is None


def test_a_layer_with_many_teachers_has_one_projector_for_all():
    projectors = Projectors("linear", {0: 0, 1: [2, 4]}, d_student=3, d_teacher=5)
    assert list(projectors.by_pair) == ["0->0", "1->any"]
    assert projectors.of(1)(torch.ones(2, 3)).shape == (2, 5)


def test_the_start_is_the_seeds():
    one, same, other = (build(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_half_precision_states_are_projected_in_the_weights_precision():
    seen = []

    def loss(student: torch.Tensor, teacher: torch.Tensor, count: int) -> torch.Tensor:
        seen.append(student.dtype)
        return student.sum() / count

    states, projector = torch.ones(4, 3, dtype=torch.bfloat16), linear.build(3, 5)
    chunked_feature_loss(
        loss, states, projector, torch.zeros(4, 5).__getitem__, d_teacher=5, count=4
    )
    assert seen == [torch.float32]


def test_an_unknown_name_is_refused_with_the_names():
    with pytest.raises(ConfigError, match="projector 'mlp' is unknown; expected one of linear"):
        Projectors("mlp", {1: 1}, d_student=3, d_teacher=5)
