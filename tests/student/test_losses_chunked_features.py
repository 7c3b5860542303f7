"""Hidden states compared some tokens at a time: value and gradient of all at once."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.student.align.chunked import chunked_feature_loss
from pipeline.student.align.projectors import linear
from pipeline.student.losses.registry import FeatureLoss, built_in
from tests.student.test_losses_chunked import Sizes

FEATURE = {loss.name: loss for loss in built_in(FeatureLoss)}
TOKENS, OWN, THEIRS, COUNT = 13, 4, 6, 17
VALUES = {"one-token": 1, "tokens": 5 * THEIRS, "whole": 10**6}


@pytest.fixture
def hidden() -> Tensor:
    return torch.randn(TOKENS, OWN, generator=torch.Generator().manual_seed(0)).requires_grad_()


@pytest.fixture
def teacher() -> Tensor:
    return torch.randn(TOKENS, THEIRS, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def projector() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return linear.build(OWN, THEIRS)


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
@pytest.mark.parametrize("name", FEATURE)
def test_chunks_are_all_tokens_at_once(name, values, hidden, teacher, projector):
    found = chunked_feature_loss(
        FEATURE[name], hidden, projector, teacher.__getitem__,
        d_teacher=THEIRS, count=COUNT, values=values,
    )  # fmt: skip
    wanted = FEATURE[name](projector(hidden), teacher, COUNT)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0)
    inputs = [hidden, *projector.parameters()]
    ours, theirs = torch.autograd.grad(3 * found, inputs), torch.autograd.grad(3 * wanted, inputs)
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_what_is_not_trained_gets_no_gradient(hidden, teacher, projector):
    for states, is_trained in ((hidden.detach(), True), (hidden, False), (hidden.detach(), False)):
        projector.requires_grad_(is_trained)
        found = chunked_feature_loss(
            FEATURE["mse"], states, projector, teacher.__getitem__, d_teacher=THEIRS, count=COUNT
        )
        needed = [one for one in (states, *projector.parameters()) if one.requires_grad]
        assert found.requires_grad == bool(needed)
        assert not needed or all(one.any() for one in torch.autograd.grad(found, needed))


def test_without_tokens_it_is_zero(hidden, teacher, projector):
    found = chunked_feature_loss(
        FEATURE["cosine"], hidden[:0], projector, teacher[:0].__getitem__,
        d_teacher=THEIRS, count=0,
    )  # fmt: skip
    assert found == 0
    found.backward()
    assert all(not one.grad.any() for one in projector.parameters())


def test_half_precision_underflows_nowhere(teacher, projector):
    """A count of a million: a token's share of it is below what float16 holds."""
    count, narrow = 10**6, torch.randn(TOKENS, OWN).half().requires_grad_()
    found = chunked_feature_loss(
        FEATURE["mse"], narrow, projector, teacher.__getitem__, d_teacher=THEIRS, count=count
    )
    (ours,) = torch.autograd.grad(found * 2.0**16, narrow)
    wide = narrow.detach().float().requires_grad_()
    (theirs,) = torch.autograd.grad(FEATURE["mse"](projector(wide), teacher, count) * 2.0**16, wide)
    assert ours.dtype == torch.float16
    assert (ours - theirs).norm() <= 2e-3 * theirs.norm()


def test_autocast_keeps_no_cast_that_has_no_gradient(hidden, teacher, projector):
    """As with a transport plan: costs without a graph first, then with one, of several chunks."""
    inputs = [hidden, *projector.parameters()]

    def found() -> Tensor:
        return chunked_feature_loss(
            FEATURE["mse"], hidden, projector, teacher.__getitem__,
            d_teacher=THEIRS, count=COUNT, values=4 * THEIRS,
        )  # fmt: skip

    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad():
            cost = found()
        value = found()
        wanted = FEATURE["mse"](projector(hidden), teacher, COUNT)
    assert torch.equal(cost, value)
    # Twice through one graph, as norms by term go.
    first = torch.autograd.grad(value, inputs, retain_graph=True)
    again = torch.autograd.grad(value, inputs)
    for one, other, plain in zip(first, again, torch.autograd.grad(wanted, inputs), strict=True):
        assert torch.equal(one, other)
        assert (one - plain).norm() <= 1e-2 * plain.norm()


def test_nothing_of_the_teachers_width_exists_for_all_tokens(hidden, teacher, projector):
    with Sizes() as made:
        chunked_feature_loss(
            FEATURE["mse"], hidden, projector, teacher.__getitem__,
            d_teacher=THEIRS, count=COUNT, values=2 * THEIRS,
        ).backward()  # fmt: skip
    assert made.largest == TOKENS * OWN
