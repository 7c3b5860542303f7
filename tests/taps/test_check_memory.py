"""The check makes no copy of logits or attention maps beside the model's own."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from pipeline.errors import IncompatibleError
from pipeline.taps import check, comparison, magnitudes, own_logits
from pipeline.taps.check import TapRequest, check_taps
from pipeline.taps.eager import eager_maps
from tests.tiny import CAUSAL, tiny_batch, tiny_model

PIECE = 64


class _Large(TorchDispatchMode):
    """Counts new tensors of at least so many values; views are not new."""

    def __init__(self, values: int) -> None:
        super().__init__()
        self.values = values
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        is_view = any(value.alias_info for value in func._schema.returns)
        for leaf in () if is_view else tree_leaves(out):
            self.count += isinstance(leaf, torch.Tensor) and leaf.numel() >= self.values
        return out


@contextmanager
def large(values: int) -> Iterator[_Large]:
    with _Large(values) as mode, torch.no_grad():
        yield mode


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    monkeypatch.setattr(comparison, "PIECE_VALUES", PIECE)


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama", layers=2, width=16, max_position_embeddings=64).eval()


def test_logits_are_those_of_two_passes(model):
    batch = tiny_batch([48, 40, 9])
    logits = batch["input_ids"].numel() * model.config.vocab_size
    with large(logits) as plain:
        model(**batch)
    with large(logits) as checked:
        check_taps(model, batch, TapRequest(hidden=[1], head=True, logits=True))
    assert plain.count > 0
    assert checked.count <= 2 * plain.count


@pytest.mark.parametrize("asked_for", [TapRequest(attention=[1, 2]), TapRequest(maps=[1, 2])])
def test_maps_are_those_of_one_eager_pass(model, asked_for):
    batch = tiny_batch([48, 40, 9])
    rows, seq = batch["input_ids"].shape
    maps = rows * model.config.num_attention_heads * seq * seq
    with large(maps) as plain:
        eager_maps(model, batch, [1, 2], lambda _, attention: attention[:1, :1, :1, :1])
    with large(maps) as checked:
        check_taps(model, batch, asked_for)
    assert plain.count > 0
    assert checked.count <= plain.count


def test_magnitudes_in_pieces_are_those_of_all_rows(model, monkeypatch):
    batch = tiny_batch([48, 40, 9])
    whole = magnitudes.input_magnitudes(model, [batch], is_causal=True)
    monkeypatch.setattr(magnitudes, "FLOAT64_VALUES", 5 * 16)
    pieces = magnitudes.input_magnitudes(model, [batch], is_causal=True)
    assert whole.keys() == pieces.keys()
    for name, value in whole.items():
        torch.testing.assert_close(pieces[name], value, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", [kind for kind in CAUSAL if kind != "gpt_oss"])
def test_logits_of_long_rows_are_compared_at_some_positions(kind, monkeypatch):
    model, batch = tiny_model(kind, vocab=1024), tiny_batch([48, 40, 9])
    request = TapRequest(hidden=[1], head=True, logits=True)
    complete = check_taps(model, batch, request)
    vocab = model.config.vocab_size
    monkeypatch.setattr(own_logits, "LARGEST_LOGITS", 3 * 12 * vocab)
    positions = own_logits.positions_to_check(model, batch["attention_mask"].bool())
    assert {0, 8, 39, 47} <= set(positions.tolist())
    assert len(positions) <= 12
    with large(3 * 13 * vocab) as checked:
        assert check_taps(model, batch, request) == complete
    assert not checked.count


def test_a_wrong_head_is_refused_at_some_positions_too(monkeypatch):
    model, batch = tiny_model("llama"), tiny_batch([48, 40, 9])
    monkeypatch.setattr(own_logits, "LARGEST_LOGITS", 3 * 12 * model.config.vocab_size)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 1.5)
    with pytest.raises(IncompatibleError, match="logits rebuilt with HeadSpec"):
        check_taps(model, batch, TapRequest(head=True))


@pytest.mark.parametrize(
    ("step", "request_"),
    [("apply_head", TapRequest(logits=True)), ("query_key_parameters", TapRequest(below=[2]))],
)
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_memory_that_runs_out_is_not_a_fault_of_the_model(
    step, request_, error, model, monkeypatch
):
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(check, step, full)
    with pytest.raises(RuntimeError) as caught:
        check_taps(model, tiny_batch([7, 5]), request_)
    assert caught.value is error
