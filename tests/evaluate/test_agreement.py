"""Agreement with the teacher's stored logits: none to lose for the teacher itself."""

import pytest
import torch
from torch.nn.functional import logsigmoid

from pipeline.errors import IncompatibleError
from pipeline.evaluate.agreement import agreement
from pipeline.student.data.stream import StoreDataset
from pipeline.taps.inputs import model_columns
from tests.captured import Captured, prepared, signal
from tests.tiny import tiny_model

CPU = torch.device("cpu")


def measured(store: Captured, model, one) -> dict[str, float]:
    digest = store.digests()[one.name]
    return agreement(model, store.store, one.name, digest, batch_tokens=64, device=CPU)


@pytest.mark.parametrize("task", ["causal-lm", "classification", "multi-label"])
def test_the_teacher_agrees_with_itself_and_another_model_does_not(task, tmp_path):
    kind = "llama" if task == "causal-lm" else "bert"
    store = prepared(tmp_path, kind, task=task, layers=1)
    one = signal("logits", None, *(["head"] if task == "causal-lm" else ["dense"]))
    store.capture([one])
    own = measured(store, store.load_teacher(attention="sdpa"), one)
    assert own["kl"] < (1e-3 if task == "causal-lm" else 1e-6)
    assert own["top1"] > (0.9 if task == "causal-lm" else 0.999)
    labels = {"multi-label": 3}.get(task, 2)
    other = tiny_model(kind, task=task, layers=1, seed=9, num_labels=labels)
    found = measured(store, other, one)
    assert found["kl"] > 0.01
    assert found["top1"] <= own["top1"]


def test_classes_that_are_there_or_not_are_compared_one_by_one(tmp_path):
    store = prepared(tmp_path, "bert", task="multi-label", layers=1)
    one = signal("logits", None, "dense")
    store.capture([one])
    student = tiny_model("bert", task="multi-label", layers=1, seed=9, num_labels=3)
    found = measured(store, student, one)
    dataset = StoreDataset(store.pinned([one]), [one.name], split="test")
    batch = dataset.__getitems__(list(range(len(dataset))))
    told = batch["features"][one.name]["logits"]
    with torch.no_grad():
        ours = student(**model_columns(student, batch)).logits
    total = 0.0
    for p, q in zip(told.flatten(), ours.flatten(), strict=True):
        yes, no = p.sigmoid(), 1 - p.sigmoid()
        total += float(yes * (logsigmoid(p) - logsigmoid(q)))
        total += float(no * (logsigmoid(-p) - logsigmoid(-q)))
    assert found["kl"] == pytest.approx(total / len(told), rel=1e-4)
    same = ((told > 0) == (ours > 0)).all(-1).float().mean()
    assert found["top1"] == pytest.approx(float(same))


def test_samples_are_no_distribution_to_agree_with(tmp_path):
    store = prepared(tmp_path, "llama", layers=1)
    one = signal("logits", None, "sampled", n=4)
    store.capture([one])
    with pytest.raises(IncompatibleError, match=r"sampled.*expected a distribution of it; capture"):
        measured(store, store.load_teacher(), one)
