"""What a batch becomes in the store does not depend on padding, pieces, or what else is kept."""

import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from pipeline.store.forms.form import Channels
from pipeline.store.signals import Signal
from pipeline.taps import check
from pipeline.taps.check import TapReport, TapRequest, check_taps
from pipeline.taps.head import linear_head
from pipeline.teacher.capture import forward
from pipeline.teacher.capture.encode import BatchEncoder, encode_rows
from pipeline.teacher.capture.forward import Batch, TappedTeacher
from pipeline.teacher.capture.segments import Arrivals
from tests.captured import signal
from tests.tiny import tiny_batch, tiny_model

HIDDEN, HEAD = signal("hidden", 1, "int8"), signal("logits", None, "head")
TOPK = signal("logits", None, "topk", k=5, temperatures=[1.0, 2.0])
SIGNALS = [
    *(HIDDEN, HEAD, TOPK),
    signal("attention", 2, "qk"),
    signal("value", 2, "int8"),
    signal("logits", None, "sampled", n=8),
]
WIDTH, VOCAB = 32, 64


def batch_of(lengths: Sequence[int]) -> Batch:
    inputs = tiny_batch(lengths)
    live = inputs["attention_mask"].bool()
    positions = None if live.all() else live.flatten().nonzero()[:, 0]
    count = int(live.sum())
    return Batch(np.arange(len(lengths)), np.arange(count), inputs, positions)


def report_of(model: PreTrainedModel, **taps: Any) -> TapReport:
    return check_taps(
        model,
        tiny_batch([9, 5]),
        TapRequest(hidden=[1], attention=[2], values=[2], logits=True, **taps),
    )


def encoder_of(
    model: PreTrainedModel, signals: Sequence[Signal] = SIGNALS, **asked: Any
) -> BatchEncoder:
    channels = Channels(torch.linspace(-1, 1, WIDTH), torch.linspace(0.5, 2, WIDTH))
    given = {s.name: channels if s.form.needs_channels else None for s in signals}
    return BatchEncoder(model, report_of(model, **asked), signals, given)


def test_rows_of_a_batch_without_padding_are_those_of_the_padded_path():
    encoder, batch = encoder_of(tiny_model("llama"), head=True), batch_of([7, 7, 7])
    assert batch.positions is None
    every = torch.arange(21)
    padded = Batch(batch.members, batch.rows, batch.inputs, every)
    plain, gathered = encoder(batch), encoder(padded)
    assert set(plain) == {one.name for one in SIGNALS}
    for name, encoded in plain.items():
        assert encoded.finite.all()
        assert encoded.finite.shape == (21,)
        for part, values in encoded.arrays.items():
            assert torch.equal(values, gathered[name].arrays[part]), (name, part)


def test_padding_between_rows_is_left_out():
    encoder = encoder_of(tiny_model("llama"), head=True)
    found = encoder(batch_of([9, 4]))
    assert {len(encoded.finite) for encoded in found.values()} == {13}
    ids = tiny_batch([9, 4])["input_ids"]
    alone = Batch(
        *(np.arange(1), np.arange(9)),
        {"input_ids": ids[:1], "attention_mask": torch.ones(1, 9, dtype=torch.long)},
        None,
    )
    for name, encoded in encoder(alone).items():
        for part, values in encoded.arrays.items():
            ours = found[name].arrays[part][:9]
            torch.testing.assert_close(ours.float(), values.float(), rtol=1e-2, atol=1.01)


@pytest.mark.parametrize("kind", ["llama", "granite", "cohere", "gpt2"])
def test_logits_in_pieces_are_the_models_own(kind, monkeypatch):
    model, batch = tiny_model(kind), batch_of([9, 4, 6])
    report = check_taps(model, tiny_batch([9, 5]), TapRequest(logits=True))
    assert report.head is not None
    monkeypatch.setattr(forward, "LOGITS", {"cpu": 5 * VOCAB})
    teacher = TappedTeacher(model, report, [TOPK])
    ((place, values),) = teacher.values(batch)
    pieces = list(teacher.pieces(place, values))
    assert [len(piece["logits"]) for piece in pieces] == [5, 5, 5, 4]
    with torch.inference_mode():
        whole = model(**batch.inputs).logits[batch.live]
    torch.testing.assert_close(
        torch.cat([piece["logits"] for piece in pieces]), whole, rtol=1e-5, atol=1e-5
    )


def test_a_head_that_is_not_plain_leaves_logits_to_the_model(monkeypatch):
    model, batch = tiny_model("llama"), batch_of([9, 4])
    plain = encoder_of(model, [TOPK])(batch)[TOPK.name]

    def other(*args: Any) -> torch.Tensor:
        raise RuntimeError("a head of another kind")

    monkeypatch.setattr(check, "apply_head", other)
    report = report_of(model)
    assert report.head is None

    def full(*args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(check, "apply_head", full)
        with pytest.raises(torch.OutOfMemoryError):
            report_of(model)
    monkeypatch.setattr(forward, "LOGITS", {"cpu": 3 * VOCAB})
    whole = BatchEncoder(model, report, [TOPK], {})(batch)[TOPK.name]
    for part, values in whole.arrays.items():
        torch.testing.assert_close(values.float(), plain.arrays[part].float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("wanted", SIGNALS, ids=lambda one: one.name.split("-")[0])
def test_what_is_encoded_beside_a_signal_does_not_change_it(wanted):
    batch = batch_of([9, 4])
    beside = encoder_of(tiny_model("llama"), head=True)(batch)[wanted.name]
    alone = encoder_of(tiny_model("llama"), [wanted], head=wanted is HEAD)(batch)[wanted.name]
    for part, values in alone.arrays.items():
        assert torch.equal(values, beside.arrays[part])


LAYERS_THAT_STAY = """
import weakref

import torch

from pipeline.taps.check import TapRequest, check_taps
from pipeline.teacher.capture.forward import TappedTeacher
from tests.captured import signal
from tests.teacher.test_encode import batch_of
from tests.tiny import tiny_batch, tiny_model

model = tiny_model("llama", layers=4)
report = check_taps(model, tiny_batch([9, 5]), TapRequest(hidden=[1, 3], attention=[2]))
chosen = [*(signal("hidden", n, "int8") for n in (1, 3)), signal("attention", 2, "qk")]
states = {}


def keep(number):
    def hook(module, args, output):
        states[number] = weakref.ref(output if isinstance(output, torch.Tensor) else output[0])

    return hook


for number, block in enumerate(model.model.layers, 1):
    block.register_forward_hook(keep(number))
for _ in TappedTeacher(model, report, chosen).values(batch_of([9, 4])):
    _ = None
    print(sorted(number for number, state in states.items() if state() is not None))
"""


@pytest.mark.slow
def test_only_chosen_layers_stay_and_each_until_it_was_looked_at():
    """In a process of its own: the type checks of tests hold what they have looked at."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", LAYERS_THAT_STAY]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:3] == ["[3]", "[]", "[]"]


@pytest.mark.parametrize("is_offloaded", [True, False])
def test_threads_take_turns_at_a_head_whose_weight_comes_and_goes(is_offloaded, monkeypatch):
    """While one thread multiplies, the other would take the weight away from under it."""
    model, batch = tiny_model("llama"), batch_of([9, 4])
    encoder = encoder_of(model, [TOPK])
    monkeypatch.setattr(forward, "has_offloaded_params", lambda _: is_offloaded)
    inside, met = [0], threading.Event()

    def enter(*_: Any) -> None:
        inside[0] += 1
        if inside[0] > 1:
            met.set()
        met.wait(0.2)

    def leave(*_: Any) -> None:
        inside[0] -= 1

    handles = [
        linear_head(model).register_forward_pre_hook(enter),
        linear_head(model).register_forward_hook(leave),
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(encoder, [batch, batch]))
    for handle in handles:
        handle.remove()
    assert met.is_set() != is_offloaded


def test_no_logits_of_all_tokens_at_once(monkeypatch):
    """The largest result of any module while a batch is encoded, in numbers."""
    model, batch = tiny_model("llama"), batch_of([9, 9, 9])
    monkeypatch.setattr(forward, "LOGITS", {"cpu": 4 * VOCAB})
    encoder = encoder_of(model, [TOPK])
    sizes: list[int] = []
    head = linear_head(model)
    handle = head.register_forward_hook(lambda m, a, output: sizes.append(output.numel()))
    encoder(batch)
    handle.remove()
    assert sizes == [4 * VOCAB] * 6 + [3 * VOCAB]


@pytest.mark.parametrize("form", ["int8", "float16", "bfloat16"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3.2e38])
def test_a_row_that_is_not_finite_is_seen_in_what_is_stored(form, value):
    rows = torch.randn(6, WIDTH)
    rows[2, 5] = value
    channels = Channels(torch.zeros(WIDTH), torch.ones(WIDTH))
    chosen = signal("hidden", 1, form).form
    encoded = encode_rows(chosen, {"hidden": rows}, channels)
    assert encoded.finite.tolist() == [row != 2 for row in range(6)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("chosen", [TOPK, SIGNALS[-1]], ids=["topk", "sampled"])
def test_a_logit_that_is_not_finite_is_seen_in_what_is_stored(chosen, value):
    logits = torch.randn(6, VOCAB)
    logits[2, 5] = value
    encoded = encode_rows(chosen.form, {"logits": logits}, None)
    assert encoded.finite.tolist() == [row != 2 for row in range(6)]


def test_a_value_that_cannot_be_stored_is_named():
    model, batch = tiny_model("llama"), batch_of([9, 4])
    encoder = encoder_of(model, head=True)
    rows = np.zeros(13, dtype=bool)
    rows[9:] = True
    assert "beyond the form's range" in encoder.first_beyond(batch, TOPK.name, rows)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    assert encoder.first_beyond(batch, HIDDEN.name, rows) == "nan"
    assert not encoder(batch)[HIDDEN.name].finite.any()


def test_rows_arrive_as_they_were_sent():
    sent = {"levels": torch.arange(12, dtype=torch.int8).view(3, 4), "scale": torch.ones(3).half()}
    arrived = Arrivals().send(sent).wait()
    for name, values in sent.items():
        np.testing.assert_array_equal(arrived[name], values.numpy(), strict=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_rows_arrive_from_a_gpu_whatever_overwrites_them_there():
    arrivals, values = Arrivals(), torch.arange(2**22, device="cuda")
    waiting = []
    for number in range(8):
        made = values + number
        waiting.append(arrivals.send({"values": made}))
        del made
    for number, arrival in enumerate(waiting):
        expected = np.arange(2**22) + number
        np.testing.assert_array_equal(arrival.wait()["values"], expected)
