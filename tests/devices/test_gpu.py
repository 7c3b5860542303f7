"""The same on a real GPU, against the CPU: `pytest -m gpu tests/devices`.

`DECANT_TEST_DEVICE=cpu` runs them on the CPU, which shows that the tests work.
"""

import math
import os
import warnings

import pytest
import torch

from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.evaluate.evaluate import evaluate_model
from pipeline.student.align.distiller import Distiller, term_counts
from pipeline.teacher.capture.spot_check import spot_check
from tests.captured import copied
from tests.devices.cases import CASES, SIGNALS, run_of
from tests.student.runs import curve

pytestmark = pytest.mark.gpu
DEVICE = torch.device(os.environ.get("DECANT_TEST_DEVICE", "cuda:0"))
CPU = torch.device("cpu")
BOUNDS = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
"""Largest difference of a loss from the CPU's in float32, relative, or absolute below 1."""


@pytest.mark.parametrize("scheduler", ["synchronous", "threads"])
def test_a_capture_is_within_each_forms_error_of_the_other_device(store, scheduler, tmp_path):
    kind, captured = store
    again = copied(captured, tmp_path / "again")
    again.store.rename(tmp_path / "old")
    again.capture(SIGNALS[kind], device=str(DEVICE), scheduler=scheduler, workers=2)
    names = sorted(again.digests())
    for reader, device in ((again.reader, CPU), (captured.reader, DEVICE)):
        checks = spot_check(reader, captured.teacher, names, device=device)
        assert {check.signal: check.share for check in checks if not check.is_within} == {}


def loss_of(distiller: Distiller, batch: dict, device: torch.device, dtype: torch.dtype) -> float:
    distiller = distiller.to(device).eval()
    counts = term_counts(batch, distiller.objective, task=distiller.task)
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = distiller(moved(batch, device), counts).total
    loss.backward()
    gradients = [p.grad for p in distiller.parameters() if p.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)
    return loss.item()


def moved(value, device):
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value.to(device)


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
@pytest.mark.parametrize(("store", "term"), CASES, indirect=["store"])
def test_a_term_is_that_of_the_cpu(store, term, dtype, tmp_path):
    kind, captured = store
    run = run_of(kind, captured, term, tmp_path)
    batch = run._dataset.__getitems__([0, 1, 2])
    exact = loss_of(run._distiller, batch, CPU, torch.float32)
    found = loss_of(run._distiller, batch, DEVICE, dtype)
    assert abs(found - exact) <= BOUNDS[dtype] * max(1.0, abs(exact))


@pytest.mark.parametrize(("store", "term"), CASES, indirect=["store"])
def test_a_term_waits_for_nothing(store, term, tmp_path):
    """Only what the student itself waits for, which a step on the labels alone shows."""
    if DEVICE.type != "cuda":
        pytest.skip("torch counts waits on CUDA alone")
    kind, captured = store
    waits = {
        name: waits_of(run_of(kind, captured, name, tmp_path / name)) for name in ("labels", term)
    }
    # `below` runs one block of the teacher, whose empty cache is copied.
    assert waits[term] <= waits["labels"] * (2 if term == "below" else 1) + 2 * (term == "below")


def waits_of(run) -> int:
    distiller = run._distiller.to(DEVICE).eval()
    batch = run._dataset.__getitems__([0, 1, 2])
    counts = term_counts(batch, distiller.objective, task=distiller.task)
    here = moved(batch, DEVICE)
    distiller(here, counts).total.backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            distiller(here, counts).total.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


@pytest.mark.parametrize("precision", ["float32", "tf32", "bfloat16", "float16"])
def test_a_student_trains(store, precision, tmp_path):
    kind, captured = store
    if kind != "llama":
        return
    if DEVICE.type != "cuda" and precision in ("tf32", "float16"):
        pytest.skip("a precision of CUDA alone")
    options = {"steps": 3, "precision": precision}
    for term in ("bfloat16", "qk", "topk"):
        root = tmp_path / term
        run = run_of(kind, captured, term, root, options=options, device=str(DEVICE))
        for _ in run.train(run.loop()):
            pass
        rows = curve(root)
        assert len(rows) == 3
        assert all(math.isfinite(value) for row in rows for value in row.values())


def test_a_teacher_is_evaluated(store):
    kind, captured = store
    tokens = TokenSet.load(captured.tokens)
    name = "train_accuracy" if kind == "bert" else "train_perplexity"
    found = [
        evaluate_model(
            captured.load_teacher(attention="sdpa"),
            tokens,
            batch_tokens=60,
            splits=("train",),
            device=device,
            is_timed=False,
        ).metrics[name]
        for device in (CPU, DEVICE)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-3)
