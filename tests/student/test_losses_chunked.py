"""Chunking a head's losses over rows changes no value and no gradient, and bounds what is alive."""

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline.student.align.chunked import (
    CPU_SIZES,
    DEVICE_SIZES,
    Ahead,
    ChunkSizes,
    chunk_sizes,
    chunked_head_loss,
    gradients_ahead,
)
from pipeline.student.losses.label import label_cross_entropy
from pipeline.student.losses.registry import OutputLoss, built_in
from pipeline.taps.head import HeadSpec, finish_logits

OUTPUT = {loss.name: loss for loss in built_in(OutputLoss)}
ROWS, WIDTH, VOCAB, K = 11, 4, 9, 3
FACTORS = (0.7, 1.9)
SIZES = {
    "one-row": ChunkSizes(1, 1),
    "ragged": ChunkSizes(4 * VOCAB, 3 * VOCAB),
    "whole": ChunkSizes(50 * VOCAB, 50 * VOCAB),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """Head, states and a teacher of random numbers; the same ones in every case."""

    def __init__(self, *, bias: bool = True, spec: HeadSpec | None = None) -> None:
        self.states = normal(ROWS, WIDTH).requires_grad_()
        self.weight = nn.Parameter(normal(VOCAB, WIDTH, seed=1))
        self.bias = nn.Parameter(normal(VOCAB, seed=2)) if bias else None
        self.spec = spec or HeadSpec(bias)
        self.teacher = normal(ROWS, VOCAB, seed=3) * 2
        self.targets = torch.arange(ROWS) % VOCAB

    def inputs(self) -> list[Tensor]:
        every = (self.states, self.weight, self.bias)
        return [one for one in every if one is not None and one.requires_grad]

    def terms(self, logits: Tensor, rows: slice, name: str, form: str, t: float, count: int):
        logits, loss = finish_logits(logits, self.spec), OUTPUT[name]
        more = {"skew": 0.3} if "skew" in loss.options.model_fields else {}
        log_probs = self.teacher[rows].log_softmax(-1)
        if form == "full":
            output = loss.full(logits, self.teacher[rows], t, count, **more)
        elif form == "topk":
            values, ids = log_probs.topk(K)
            normalizer = (log_probs / t).logsumexp(-1)
            assert loss.topk is not None
            output = loss.topk(logits, ids, values, normalizer, t, count, **more)
        else:
            assert loss.sampled is not None
            output = loss.sampled(logits, log_probs.topk(K).indices, t, count)
        return output, label_cross_entropy(logits, self.targets[rows], count)

    def chunked(
        self, sizes: ChunkSizes | None, name="forward_kl", form="full", t=1.0, factors=FACTORS,
        count: int = ROWS, rows: int = ROWS, only: int | None = None, states=None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        def begin(chunk: slice):
            first = chunk.start

            def losses(logits: Tensor, block: slice):
                inside = slice(first + block.start, first + block.start + len(logits))
                found = self.terms(logits, inside, name, form, t, count)
                return found if only is None else found[only : only + 1]

            return losses

        states = self.states if states is None else states
        return chunked_head_loss(
            begin, states[:rows], self.weight, self.bias, factors=factors, count=count, sizes=sizes
        )

    def plain(self, name="forward_kl", form="full", t=1.0, factors=FACTORS, rows=ROWS, count=ROWS):
        logits = F.linear(self.states[:rows], self.weight, self.bias)
        terms = self.terms(logits, slice(0, rows), name, form, t, count)
        return sum(factor * term for factor, term in zip(factors, terms, strict=True)), terms


def assert_equal_gradients(case: Case, ours: Tensor, plain: Tensor, rtol: float = 1e-5) -> None:
    kept = {"retain_graph": True, "materialize_grads": True}
    found = torch.autograd.grad(ours, case.inputs(), **kept)
    wanted = torch.autograd.grad(plain, case.inputs(), **kept)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == other.dtype
        assert (one - other).norm() <= rtol * other.norm() + 1e-12


FORMS = [
    *((name, form) for name in OUTPUT for form in ("full", "topk", "sampled")
      if form == "full" or getattr(OUTPUT[name], form) is not None),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(("name", "form"), FORMS)
def test_chunked_equals_plain_in_value_and_every_gradient(name, form, sizes):
    temperatures = (1.0,) if form == "sampled" or name == "mse" else (1.0, 2.0)
    for t in temperatures:
        case = Case()
        total, terms = case.chunked(sizes, name, form, t)
        wanted, plain_terms = case.plain(name, form, t)
        torch.testing.assert_close((total, *terms), (wanted, *plain_terms), rtol=1e-5, atol=1e-6)
        assert_equal_gradients(case, total, wanted)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize(
    ("bias", "spec"),
    [
        (False, HeadSpec(bias=False)),
        (True, HeadSpec(bias=True, scale=0.3)),
        (False, HeadSpec(bias=False, softcap=1.5)),
        (True, HeadSpec(bias=True, scale=2.0, softcap=3.0)),
    ],
)
def test_a_bias_a_scale_and_a_soft_cap_have_their_part(bias, spec, sizes):
    case = Case(bias=bias, spec=spec)
    total, _ = case.chunked(sizes, t=2.0)
    assert_equal_gradients(case, total, case.plain(t=2.0)[0])


def test_factors_weigh_the_sum_and_not_the_terms():
    case = Case()
    for factors in ((0.0, 1.0), (1.0, 0.0), (torch.tensor(0.25), 3.0), (0.0, 0.0)):
        total, terms = case.chunked(SIZES["ragged"], factors=factors)
        wanted, plain_terms = case.plain(factors=factors)
        torch.testing.assert_close(terms, plain_terms)
        assert not any(term.requires_grad for term in terms)
        assert_equal_gradients(case, total, wanted)


def test_terms_apart_add_up_to_the_terms_together():
    case = Case()
    together, terms = case.chunked(SIZES["ragged"])
    apart = [case.chunked(SIZES["ragged"], factors=(1.0,), only=i)[0] for i in (0, 1)]
    torch.testing.assert_close(tuple(apart), terms)
    weighted = FACTORS[0] * apart[0] + FACTORS[1] * apart[1]
    assert_equal_gradients(case, together, weighted)
    for one, plain in zip(apart, case.plain()[1], strict=True):
        assert_equal_gradients(case, one, plain)


@pytest.mark.parametrize("tensor", [False, True])
def test_a_count_beyond_the_rows_divides_alike(tensor):
    case = Case()
    total, _ = case.chunked(SIZES["ragged"], count=torch.tensor(40) if tensor else 40)  # pyright: ignore
    assert_equal_gradients(case, total, case.plain(count=40)[0])


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("count", [0, 5])
def test_no_rows_are_zero_and_reach_the_head(sizes, count):
    case = Case()
    total, terms = case.chunked(sizes, rows=0, count=count)
    total.backward()
    assert total.item() == 0.0
    assert [term.item() for term in terms] == [0.0, 0.0]
    for one in case.inputs():
        assert one.grad is not None
        assert (one.grad == 0).all()


def test_a_tied_head_gets_the_sum_of_both_uses():
    embedding, ids = nn.Embedding(VOCAB, WIDTH), torch.arange(ROWS) % VOCAB
    found = []
    for is_chunked in (True, False):
        case = Case(bias=False)
        case.weight = embedding.weight
        embedding.weight.grad = None
        case.states = embedding(ids).tanh()
        total, _ = case.chunked(SIZES["ragged"]) if is_chunked else case.plain()
        total.backward()
        found.append(embedding.weight.grad)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("frozen", ["weight", "states"])
def test_what_is_frozen_costs_no_gradient(frozen):
    for is_frozen in (False, True):
        case = Case()
        getattr(case, frozen).requires_grad_(not is_frozen)
        with Sizes() as sizes:
            total, _ = case.chunked(SIZES["ragged"])
        made = (VOCAB, WIDTH) if frozen == "weight" else (ROWS, WIDTH)
        assert (made in sizes.shapes) != is_frozen
        assert_equal_gradients(case, total, case.plain()[0])


def test_without_gradients_none_are_found():
    case = Case()
    seen = []

    def begin(chunk: slice):
        def losses(logits: Tensor, block: slice):
            seen.append((logits.requires_grad, torch.is_grad_enabled()))
            return (logits.sum(),)

        return losses

    options = {"factors": (1.0,), "count": 1, "sizes": SIZES["ragged"]}
    with torch.no_grad():
        total, _ = chunked_head_loss(begin, case.states, case.weight, case.bias, **options)
    assert not total.requires_grad
    frozen = [one.detach() for one in (case.states, case.weight)]
    total, _ = chunked_head_loss(begin, *frozen, None, **options)
    assert not total.requires_grad
    assert set(seen) == {(False, False)}


def test_the_graph_is_gone_through_twice_and_with_any_gradient():
    case = Case()
    total, _ = case.chunked(SIZES["ragged"])
    once = torch.autograd.grad(total, case.inputs(), retain_graph=True)
    again = torch.autograd.grad(total, case.inputs(), retain_graph=True)
    scaled = torch.autograd.grad(total * 65536.0, case.inputs())
    torch.testing.assert_close(again, once, rtol=0, atol=0)
    torch.testing.assert_close(scaled, tuple(one * 65536.0 for one in once), rtol=1e-6, atol=0)


def test_a_second_derivative_is_refused():
    case = Case()
    total, _ = case.chunked(SIZES["ragged"])
    (first,) = torch.autograd.grad(total.square(), case.states, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
    (first,) = torch.autograd.grad(total, case.states, create_graph=True)
    assert not first.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_products_are_narrow_and_the_head_sums_wide(dtype):
    """Beside plain autograd under the same autocast, whose own error against float32 is measured.

    A row's gradient among a million rows is below what float16 holds: nothing may underflow.
    """
    count = 10**6
    case = Case()
    with torch.autocast("cpu", dtype):
        total, _ = case.chunked(SIZES["ragged"], t=2.0, count=count)
    wanted = torch.autograd.grad(case.plain(t=2.0, count=count)[0], case.inputs())
    found = torch.autograd.grad(total, case.inputs())
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.02 * other.norm()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_gradients_are_scaled_by_on_the_way_back_is_not_rounded(dtype, device):
    """Loss scaling may make it larger than float16 holds, though what it multiplies is small."""
    kept = (torch.arange(1.0, 129.0, device=device) / 1024).to(dtype)
    given = torch.zeros_like(kept, requires_grad=True)
    found = Ahead(torch.zeros((), device=device), (), (kept,))
    total, _ = gradients_ahead(lambda needs: found, (given,), scale=1)
    (gradient,) = torch.autograd.grad(total * 100_001.0, given)
    assert torch.equal(gradient, (kept.float() * 100_001.0).to(dtype))


def test_parameters_in_half_precision_keep_their_dtype():
    case = Case()
    for one in case.inputs():
        one.data = one.data.bfloat16()
    total, _ = case.chunked(SIZES["ragged"])
    found = torch.autograd.grad(total, case.inputs())
    assert {one.dtype for one in found} == {torch.bfloat16}
    assert total.dtype == torch.float32


class Sizes(TorchDispatchMode):
    """Remembers the shape of every tensor that an operation makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        given = {one.untyped_storage().data_ptr() for one in args if isinstance(one, Tensor)}
        for one in found if isinstance(found, list | tuple) else (found,):
            if isinstance(one, Tensor) and one.untyped_storage().data_ptr() not in given:
                self.shapes.add(tuple(one.shape))
        return found

    @property
    def largest(self) -> int:
        return max(math.prod(shape) for shape in self.shapes)


def test_no_more_than_a_chunk_of_logits_is_ever_made():
    rows, vocab = 300, 1000
    weight = normal(vocab, 2).requires_grad_()
    states, targets = normal(rows, 2).requires_grad_(), torch.zeros(rows, dtype=torch.long)

    def begin(chunk: slice):
        return lambda logits, block: (label_cross_entropy(logits, targets[chunk][block], rows),)

    with Sizes() as plain:
        label_cross_entropy(F.linear(states, weight), targets, rows).backward()
    assert plain.largest == rows * vocab
    with Sizes() as sizes:
        total, _ = chunked_head_loss(
            begin, states, weight, None, factors=(1.0,), count=rows, sizes=ChunkSizes(8000, 3000)
        )
        total.backward()
    assert sizes.largest == 8000
    assert {(8, vocab), (3, vocab), (2, vocab)} <= sizes.shapes
    assert (vocab,) not in sizes.shapes


def test_the_sizes_fit_the_device():
    assert chunk_sizes(torch.device("cpu")) == CPU_SIZES
    assert chunk_sizes(torch.device("cuda")) == DEVICE_SIZES
    for sizes in (CPU_SIZES, DEVICE_SIZES):
        assert sizes.block <= sizes.chunk
