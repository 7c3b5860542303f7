"""One step of a loss in a process of its own: plain autograd with everything at once, or ours.

Prints one JSON line: seconds of the step and how far the process grew above what it held before.
"""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from benchmarks.synthetic import stopwatch
from pipeline.student.align.chunked import BlockLoss, chunked_head_loss, chunked_map_loss
from pipeline.student.losses.attention import attention_kl
from pipeline.student.losses.output import forward_kl
from pipeline.taps.scores import rows_of_vectors

TEMPERATURE = 2.0
LAYERS, HEADS, D_HEAD = 6, 12, 64
WARM_ROWS = 16

Step = Callable[[], dict[str, Tensor]]
"""Goes forward and backward and returns the gradients."""


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Return random numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).mul_(scale)


def divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher ‖ student) of log-probabilities, as one writes it down."""
    return (teacher.exp() * (teacher - student)).sum(-1)


def head_inputs(rows: int, vocab: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the student's rows and head, which learn, and the teacher's, of the same width."""
    scale = width**-0.5
    return (
        normal(rows, width, seed=0).requires_grad_(),
        normal(vocab, width, seed=1, scale=scale).requires_grad_(),
        normal(rows, width, seed=2),
        normal(vocab, width, seed=3, scale=scale),
    )


def full_loss(rows: int, vocab: int, width: int) -> Step:
    """Both sides' logits as a whole, in float32."""
    states, head, told, told_head = head_inputs(rows, vocab, width)

    def step() -> dict[str, Tensor]:
        student = F.log_softmax(F.linear(states, head) / TEMPERATURE, dim=-1)
        teacher = F.log_softmax(F.linear(told, told_head) / TEMPERATURE, dim=-1)
        (divergence(student, teacher).mean() * TEMPERATURE**2).backward()
        return gradients(states=states, head=head)

    return step


def our_loss(rows: int, vocab: int, width: int) -> Step:
    """The same as the product computes it."""
    states, head, told, told_head = head_inputs(rows, vocab, width)

    def begin(chunk: slice) -> BlockLoss:
        teacher = F.linear(told[chunk], told_head)
        return lambda logits, block: (forward_kl.full(logits, teacher[block], TEMPERATURE, rows),)

    def step() -> dict[str, Tensor]:
        total, _ = chunked_head_loss(begin, states, head, None, factors=(1.0,), count=rows)
        total.backward()
        return gradients(states=states, head=head)

    return step


def vectors(batch: int, seq: int) -> list[list[Tensor]]:
    """Return query and key of student, which learn, and of the teacher, of each layer."""
    shape = (batch, HEADS, seq, D_HEAD)
    layers = [[normal(*shape, seed=4 * layer + i) for i in range(4)] for layer in range(LAYERS)]
    for query, key, *_ in layers:
        query.requires_grad_()
        key.requires_grad_()
    return layers


def full_attention(batch: int, seq: int) -> Step:
    """The causal maps of both sides as a whole, of all layers."""
    layers = vectors(batch, seq)

    def log_maps(query: Tensor, key: Tensor, unseen: Tensor) -> Tensor:
        scores = query @ key.transpose(-1, -2) * D_HEAD**-0.5
        return scores.masked_fill(unseen, -1e9).log_softmax(-1)

    def step() -> dict[str, Tensor]:
        unseen = torch.ones(seq, seq, dtype=torch.bool).triu(1)
        losses = [
            divergence(log_maps(q, k, unseen), log_maps(tq, tk, unseen)).mean()
            for q, k, tq, tk in layers
        ]
        torch.stack(losses).mean().backward()
        return layer_gradients(layers)

    return step


def our_attention(batch: int, seq: int) -> Step:
    """The same as the product computes it."""
    layers, live = vectors(batch, seq), torch.ones(batch, seq, dtype=torch.bool)
    scaling = D_HEAD**-0.5

    def step() -> dict[str, Tensor]:
        losses = [
            chunked_map_loss(
                attention_kl,
                q,
                k,
                scaling,
                rows_of_vectors(tq, tk, scaling),
                live,
                "causal",
                count=batch * seq,
                teacher_heads=HEADS,
            )
            for q, k, tq, tk in layers
        ]
        torch.stack(losses).mean().backward()
        return layer_gradients(layers)

    return step


def gradients(**inputs: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each input."""
    found = {}
    for name, one in inputs.items():
        assert one.grad is not None
        found[name] = one.grad
    return found


def layer_gradients(layers: list[list[Tensor]]) -> dict[str, Tensor]:
    """Return the gradients of every layer's query and key."""
    found: dict[str, Tensor] = {}
    for number, (query, key, *_) in enumerate(layers):
        found |= gradients(**{f"query_{number}": query, f"key_{number}": key})
    return found


ARMS: dict[str, Callable[..., Step]] = {
    "full_loss": full_loss,
    "our_loss": our_loss,
    "full_attention": full_attention,
    "our_attention": our_attention,
}


def status_bytes(field: str) -> int:
    """Return what Linux says of this process: VmRSS, its memory now, or VmHWM, the most of it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)


def run(arm: str, keep: str | None, sizes: dict[str, int]) -> dict[str, Any]:
    """Measure one step; keep its gradients in a file if there is one."""
    # Threads and libraries start in a step that is not counted.
    small = {key: min(value, WARM_ROWS) for key, value in sizes.items()}
    ARMS[arm](**small)()
    step = ARMS[arm](**sizes)
    with suppress(OSError):  # where the kernel lets a process forget its peak
        Path("/proc/self/clear_refs").write_text("5")
    before = status_bytes("VmRSS")
    with stopwatch() as watch:
        found = step()
    after = status_bytes("VmHWM")
    if keep is not None:
        save_file(found, keep)
    return {"seconds": watch.seconds, "cpu_seconds": watch.cpu_seconds, "bytes": after - before}


if __name__ == "__main__":
    print(json.dumps(run(**json.loads(sys.argv[1]))))
