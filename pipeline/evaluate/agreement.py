"""How close a student's output is to its teacher's, from the logits in the store."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from tqdm import tqdm
from transformers import PreTrainedModel

from pipeline.axes import TEST
from pipeline.errors import IncompatibleError, IntegrityError
from pipeline.store.forms.form import Content
from pipeline.store.plan import bucketed_batches
from pipeline.store.reader import StoreReader
from pipeline.student.data.features import TeacherFeatures, TeacherLogits
from pipeline.student.data.stream import StoreDataset
from pipeline.student.losses.output import forward_kl
from pipeline.taps.anatomy import find_anatomy
from pipeline.taps.inputs import model_columns, model_inputs
from pipeline.tasks import models_language

CHUNK_ROWS = 1024


@torch.inference_mode()
def agreement(
    model: PreTrainedModel,
    store: Path,
    signal: str,
    digest: str,
    *,
    batch_tokens: int,
    device: torch.device,
    split: str = TEST,
) -> dict[str, float]:
    """Compare a student with the teacher's stored logits.

    Returns:
        `kl`: mean KL(teacher ‖ student) at temperature 1, in nats a position (for the form topk
        over the top k and the rest, a lower bound). `top1`: share of positions where both have the
        same most probable output. For multi-label tasks `kl` is the sum over independent classes
        and `top1` the share of examples with the same set of classes.

    Raises:
        IncompatibleError: If the signal holds samples: a student cannot be compared with those.
        IntegrityError: If the store is not what the digest says, or holds no example of the split.
    """
    reader = StoreReader(store, {signal: digest})
    form = reader.signal(signal).declaration.form
    if form.content is Content.SAMPLES:
        raise IncompatibleError(
            f"{signal}: samples of the teacher's output, expected a distribution of it; capture "
            "logits in form head or topk too"
        )
    is_causal_lm = models_language(reader.plan["task"])
    is_multi_label = reader.plan["task"] == "multi-label"
    # Any captured temperature will do: at temperature 1 no normaliser is needed.
    temperature, *_ = form.temperatures_served or (1.0,)
    features = TeacherFeatures(reader, [signal], temperature=temperature).to(device)
    dataset = StoreDataset(reader, [signal], split=split)
    if not len(dataset):
        raise IntegrityError(f"{store}: no {split} example; capture with a corpus that has some")
    model = model.to(device).eval()  # pyright: ignore[reportCallIssue, reportArgumentType]
    is_causal = find_anatomy(model).is_causal
    divergence, same, positions = 0.0, 0, 0
    for members in tqdm(
        _batches(dataset, batch_tokens), desc="agreement", unit="batch", mininterval=1.0
    ):
        batch = _to(dataset.__getitems__(members), device)
        inputs = model_inputs(model_columns(model, batch), is_causal=is_causal)
        logits = model(**inputs).logits
        rows = logits
        if is_causal_lm:
            rows = logits.flatten(0, 1).index_select(0, batch["positions"]["targets"])
        parts = features.output_parts(batch)
        for first in range(0, len(rows), CHUNK_ROWS):
            chunk = slice(first, first + CHUNK_ROWS)
            teacher = features.logits(*(part[chunk] for part in parts))
            if is_multi_label:
                assert teacher.full is not None
                divergence += float(_binary_divergence(rows[chunk], teacher.full))
                same += int(((rows[chunk] > 0) == (teacher.full > 0)).all(-1).sum())
            else:
                divergence += float(_divergence(rows[chunk], teacher))
                same += int((rows[chunk].argmax(-1) == _likeliest(teacher)).sum())
            positions += len(rows[chunk])
    if not positions:
        raise IntegrityError(
            f"{store}: no target among {len(dataset)} {split} examples; expected a corpus whose "
            "loss mask keeps some"
        )
    return {"kl": divergence / positions, "top1": same / positions}


def _batches(dataset: StoreDataset, batch_tokens: int) -> list[list[int]]:
    """Batch each segment separately, so that each is read once."""
    by_segment = [np.flatnonzero(dataset.segment == s) for s in np.unique(dataset.segment)]
    return [
        members[chosen].tolist()
        for members in by_segment
        for chosen in bucketed_batches(dataset.length[members], batch_tokens)
    ]


def _divergence(student: Tensor, teacher: TeacherLogits) -> Tensor:
    if teacher.full is not None:
        return forward_kl.full(student, teacher.full, 1.0, count=1.0)
    assert forward_kl.topk is not None
    assert teacher.ids is not None
    assert teacher.log_probs is not None
    # At temperature 1 the log-probabilities are normalised already.
    zero = torch.zeros(len(student), device=student.device)
    return forward_kl.topk(student, teacher.ids, teacher.log_probs, zero, 1.0, count=1.0)


def _binary_divergence(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the sum of the divergences of independent binary classes."""
    student, teacher = student.float(), teacher.float()
    there = teacher.sigmoid() * (logsigmoid(teacher) - logsigmoid(student))
    absent = (-teacher).sigmoid() * (logsigmoid(-teacher) - logsigmoid(-student))
    return (there + absent).sum()


def _likeliest(teacher: TeacherLogits) -> Tensor:
    if teacher.full is not None:
        return teacher.full.argmax(-1)
    assert forward_kl.topk is not None
    assert teacher.ids is not None
    assert teacher.log_probs is not None
    best = teacher.log_probs.argmax(-1, keepdim=True)
    return teacher.ids.gather(-1, best)[:, 0]


def _to(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        key: _to(value, device) if isinstance(value, Mapping) else value.to(device)
        for key, value in batch.items()
    }
