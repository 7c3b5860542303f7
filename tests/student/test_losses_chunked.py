"""Chunking a loss over rows changes neither value nor gradient, and bounds what is alive."""

import pytest
import torch
from torch import Tensor, nn

from pipeline.student.losses.chunked import chunked_rows
from pipeline.student.losses.forward_kl import forward_kl
from pipeline.student.losses.labels import label_cross_entropy

ROWS, WIDTH, VOCAB = 11, 4, 9


def make() -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(WIDTH, VOCAB)
    with torch.no_grad():
        head.weight.copy_(torch.randn(VOCAB, WIDTH, generator=generator))
        head.bias.zero_()
    states = torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True)
    teacher = torch.randn(ROWS, VOCAB, generator=generator)
    return head, states, teacher, torch.arange(ROWS) % VOCAB


@pytest.mark.parametrize("chunk_rows", [1, 3, 10, 11, 50])
def test_chunked_equals_plain_in_value_and_every_gradient(chunk_rows):
    results = []
    for rows in (ROWS, chunk_rows):
        head, states, teacher, targets = make()

        def losses(x: Tensor, t: Tensor, y: Tensor, head=head) -> tuple[Tensor, ...]:
            logits = head(x)
            return forward_kl(logits, t, 2.0, ROWS), label_cross_entropy(logits, y, ROWS)

        soft, hard = chunked_rows(losses, states, teacher, targets, chunk_rows=rows)
        (soft + 0.5 * hard).backward()
        results.append([soft, hard, states.grad, head.weight.grad, head.bias.grad])
    for plain, chunked in zip(*results, strict=True):
        torch.testing.assert_close(chunked, plain)


def test_a_single_scalar_and_no_graph():
    head, states, teacher, _ = make()

    def loss(x: Tensor, t: Tensor) -> Tensor:
        return forward_kl(head(x), t, 1.0, ROWS)

    with torch.no_grad():
        value = chunked_rows(loss, states, teacher, chunk_rows=2)
        torch.testing.assert_close(value, loss(states, teacher))
    assert not value.requires_grad


@pytest.mark.parametrize("chunk_rows", [1, 4])
def test_no_rows_are_zero_and_reach_the_head(chunk_rows):
    head, states, teacher, _ = make()
    loss = chunked_rows(
        lambda x, t: forward_kl(head(x), t, 1.0), states[:0], teacher[:0], chunk_rows=chunk_rows
    )
    loss.backward()
    assert loss.item() == 0.0
    assert (head.weight.grad == 0).all()


def test_no_logits_are_kept_between_forward_and_backward():
    head, states, _, targets = make()
    kept: list[torch.Size] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return label_cross_entropy(head(x), y, ROWS)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss(states, targets)
        assert [shape for shape in kept if shape[-1:] == (VOCAB,)]  # the probe sees logits
        kept.clear()
        chunked_rows(loss, states, targets, chunk_rows=3)
    assert not [shape for shape in kept if shape[-1:] == (VOCAB,)]


def test_one_chunk_of_logits_is_alive_at_a_time():
    head, states, teacher, _ = make()
    sizes: list[int] = []

    def loss(x: Tensor, t: Tensor) -> Tensor:
        sizes.append(len(x))
        return forward_kl(head(x), t, 1.0, ROWS)

    chunked_rows(loss, states, teacher, chunk_rows=4).backward()
    assert sorted(sizes) == [3, 3, 4, 4, 4, 4]  # every chunk once forward, once backward


def test_a_chunk_has_rows():
    head, states, teacher, _ = make()
    with pytest.raises(ValueError, match="chunk_rows is 0; a chunk needs at least 1 row"):
        chunked_rows(lambda x, t: forward_kl(head(x), t, 1.0), states, teacher, chunk_rows=0)
