"""Capture, training and evaluation stay on the GPU, and wait for it no more than the model does."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, TrainerState

from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.evaluate.agreement import agreement
from pipeline.evaluate.evaluate import evaluate_model
from pipeline.generation.generate import generate_ids
from pipeline.generation.options import GenerationOptions
from pipeline.store.forms.form import Channels
from pipeline.store.reader import StoreReader
from pipeline.student.align.distiller import Distiller, term_counts
from pipeline.student.data.feed import Fed
from pipeline.student.loop.gradient import StepGradient
from pipeline.taps.inputs import model_columns, model_inputs, run_base
from pipeline.teacher.capture import capture as capturing
from pipeline.teacher.capture.encode import BatchEncoder
from pipeline.teacher.capture.forward import segment_batches
from pipeline.teacher.capture.segments import CapturedSegment, SegmentCapture
from pipeline.teacher.capture.tap_check import check_signals, checked_batch
from pipeline.teacher.workers import schedule
from tests.captured import copied
from tests.devices.cases import CASES, SIGNALS, run_of
from tests.devices.pretended import CUDA, Machine, on_gpu, pretended_gpu, waited


@pytest.fixture
def machine():
    with pretended_gpu():
        yield


def waits_of(model: PreTrainedModel, batch: Any, *, is_causal: bool) -> Counter[str]:
    """What one plain pass of the model waits for: transformers looks at the positions."""
    before = Counter(waited)
    run_base(model, model_inputs(model_columns(model, batch), is_causal=is_causal))
    return by_operation(waited - before)


READ = ("aten._local_scalar_dense.default", "aten.is_nonzero.default")
"""A number is read; which of the two it is depends on the inference mode."""


def by_operation(lines: Counter[str]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for line, count in lines.items():
        operation = line.split(" ")[0]
        counts["number" if operation in READ else operation] += count
    return counts


class OnThisThread(SegmentCapture):
    """A thread has modes of its own."""

    def launch(self, *arguments: Any) -> Callable[[], CapturedSegment]:
        with Machine():
            return super().launch(*arguments)


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_a_capture_on_a_gpu_writes_what_one_on_the_cpu_does(
    store, scheduler, tmp_path, monkeypatch
):
    kind, captured = store
    again = copied(captured, tmp_path / "again")
    again.store.rename(tmp_path / "old")
    model = again.load_teacher(attention="sdpa")
    model.config.use_cache = False
    monkeypatch.setattr(capturing, "load_teacher", lambda *_, **__: on_gpu(model))
    monkeypatch.setattr(schedule, "SegmentCapture", OnThisThread)
    with pretended_gpu():
        again.capture(SIGNALS[kind], device="cuda:0", scheduler=scheduler, workers=2)
    assert again.digests() == captured.digests()


KNOWN_IN_CAPTURE = Counter({"mask": 1})
"""The pairs of a layer whose maps are stored are picked by a mask."""


@pytest.mark.usefixtures("machine")
def test_encoding_a_batch_waits_for_nothing_else(store):
    kind, captured = store
    reader, signals = StoreReader(captured.store), SIGNALS[kind]
    segment = reader.read_segment(0)
    model = on_gpu(captured.load_teacher(attention="sdpa"))
    model.config.use_cache = False
    batch = checked_batch(model, segment, 4, 0, CUDA)
    report = check_signals(model, batch, signals, max_length=32)
    stored = [signal for signal in signals if signal.form.name != "below"]
    channels = {signal.name: channels_of(reader, signal.name) for signal in stored}
    encode = BatchEncoder(model, report, stored, channels)
    encode(batch)
    waited.clear()
    [batch, *_] = segment_batches(segment, 60, 0, CUDA)
    encoded = encode(batch)
    devices = {array.device for one in encoded.values() for array in one.arrays.values()}
    assert devices == {CUDA}
    found = by_operation(waited)
    own = waits_of(model, batch.inputs, is_causal=report.causal)
    # The second pass, under eager attention, is the model's too.
    assert found - own - own <= KNOWN_IN_CAPTURE


def channels_of(reader: StoreReader, name: str) -> Channels | None:
    channels = reader.channels(name)
    if channels is None:
        return None
    return Channels(*(torch.from_numpy(v.copy()) for v in (channels.mean, channels.deviation)))


BLOCK = Counter({"copy": 2, "number": 1, "mask": 1})
"""Waits of the block that the form `below` runs: its empty cache, and in GPT-2 more."""


def step(distiller: Distiller, batch: Any) -> None:
    """The gradient of a step. Clipping asks C++ for the device, which knows just the CPU here."""
    goal, state = distiller.objective, TrainerState(max_steps=9, logging_steps=9)
    accelerator = Accelerator(cpu=True)
    gradient = StepGradient(distiller, distiller, accelerator, max_norm=1.0, has_norms=False)
    counts = term_counts(batch, goal, task=distiller.task)
    gradient.compute([Fed([batch], counts, 0)], state)


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize(("store", "term"), CASES, indirect=["store"])
def test_a_step_waits_for_no_more_than_the_student_does(store, term, tmp_path, monkeypatch):
    kind, captured = store
    run = run_of(kind, captured, term, tmp_path)
    distiller, batch = on_gpu(run._distiller), on_gpu(run._dataset.__getitems__([0, 1, 2]))
    # Dropout's mask would be made on the CPU by C++.
    monkeypatch.setattr(distiller.eval(), "train", lambda *_: distiller)
    step(distiller, batch)
    gradients = [p.grad for p in distiller.parameters() if p.grad is not None]
    assert {gradient.device for gradient in gradients} == {CUDA}
    waited.clear()
    step(distiller, batch)
    found = by_operation(waited)
    own = waits_of(distiller.student, batch, is_causal=kind != "bert")
    assert found <= own + (BLOCK if term == "below" else Counter()), waited


@pytest.mark.usefixtures("machine")
def test_a_student_is_evaluated_where_it_is(store):
    kind, captured = store
    model, tokens = captured.load_teacher(attention="sdpa"), TokenSet.load(captured.tokens)
    evaluation = evaluate_model(
        model, tokens, batch_tokens=60, splits=("train",), device=CUDA, is_timed=False
    )
    assert next(model.parameters()).device == CUDA
    assert evaluation.metrics["train_accuracy" if kind == "bert" else "train_perplexity"] > 0
    form = "dense" if kind == "bert" else "topk"
    name = next(s.name for s in SIGNALS[kind] if s.kind == "logits" and s.form.name == form)
    found = agreement(
        model,
        captured.store,
        name,
        captured.digests()[name],
        split="train",
        batch_tokens=60,
        device=CUDA,
    )
    assert found["top1"] > 0.99


@pytest.mark.usefixtures("machine")
def test_text_is_generated_where_the_model_is(store):
    kind, captured = store
    if kind == "bert":
        return
    model = on_gpu(captured.load_teacher(attention="sdpa"))
    prompts = [[3, 5, 7], [4, 9]]
    options = GenerationOptions(max_new_tokens=4, batch_size=2)
    texts = generate_ids(
        model, prompts, options=options, pad_id=0, eos_ids=[], device=CUDA, description="texts"
    )
    assert [len(text) for text in texts] == [4, 4]
