"""What the benchmark of capped memory runs: a student of some terms, in a process of its own.

The arms `labels`, `soft` and `aligned` are stage two as it is. `plain` is training on labels by the
library's own loss; `live` has the teacher in the same process.
"""

import ctypes
import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.synthetic import PAD_ID, write_corpus, write_teacher
from benchmarks.train_arms import Widened
from pipeline.errors import DecantError
from pipeline.runtime import Runtime
from pipeline.store.forms.registry import build_form
from pipeline.store.reader import StoreReader
from pipeline.store.signals import Signal
from pipeline.student.align.distiller import Distiller, Losses
from pipeline.student.align.objective import Objective
from pipeline.student.data.batch_order import BatchOrder
from pipeline.student.data.features import TeacherFeatures
from pipeline.student.data.stream import StoreDataset
from pipeline.student.loop.steps import StudentLoop
from pipeline.taps.inputs import model_columns, model_inputs, run_base
from pipeline.taps.tap import tap
from pipeline.teacher.capture.capture import capture
from pipeline.teacher.capture.spec import SegmentOptions
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.source.reference import TeacherReference
from pipeline.training.arguments import training_arguments
from pipeline.training.options import TrainOptions

LEARNT: Mapping[str, tuple[str, ...]] = {
    "plain": ("labels",),
    "labels": ("labels",),
    "soft": ("output",),
    "aligned": ("feature", "attention", "output"),
    "live": ("feature", "attention", "output"),
}
"""By arm, the terms of its loss."""


@dataclass(frozen=True)
class Size:
    """Teacher, student and batch; `maps` is student layer to teacher layer.

    The teacher has 13 times the student's weights, as 7 B has of 0.5 B.
    """

    layers: int = 24
    width: int = 1024
    heads: int = 16
    vocab: int = 32_000
    student_width: int = 512
    maps: tuple[tuple[int, int], ...] = ((1, 8), (2, 16), (3, 24))
    length: int = 512
    batch: int = 4
    segment_rows: int = 8
    rows: int = 64
    steps: int = 6

    @property
    def signals(self) -> list[Signal]:
        """The student's signals in their default forms."""
        return [
            *(Signal(build_form("hidden", "int8", {}), t) for _, t in self.maps),
            *(Signal(build_form("attention", "qk", {}), t) for _, t in self.maps),
            Signal(build_form("logits", "head", {}), None),
        ]


QUICK = Size(
    layers=6,
    width=512,
    heads=8,
    vocab=8000,
    student_width=256,
    maps=((1, 3), (2, 6)),
    length=256,
    rows=16,
    steps=3,
)


class Plain(Distiller):
    """Labels alone, by the model's own loss."""

    def forward(self, batch: Any, counts: Any, factors: Any = None, *, apart: bool = False) -> Any:
        """Return the library's loss."""
        targets = batch["input_ids"].masked_fill(~batch["attention_mask"].bool(), -100)
        inputs = model_inputs(model_columns(self.student, batch), is_causal=True)
        loss = self.student(**inputs, labels=targets).loss
        return Losses(loss, {"labels": loss})


class Beside(Distiller):
    """The teacher runs in each step, tapped, and nothing of it is stored."""

    teacher: tuple[Any, ...] = ()

    def forward(self, batch: Any, counts: Any, factors: Any = None, *, apart: bool = False) -> Any:
        """Return the same terms as from the store, of the teacher's own values."""
        live = batch["attention_mask"].bool()
        [teacher] = self.teacher
        layers: dict[str, Any] = {
            "hidden": list(self.feature_map.values()),
            "attention": list(self.attention_map.values()),
        }
        inputs = model_inputs(model_columns(teacher, batch), is_causal=True)
        with torch.no_grad(), tap(teacher, **layers, head=True) as record:
            run_base(teacher, inputs)
        assert record.head_input is not None

        def name(kind: str, layer: int | None = None) -> str:
            return self.features.declaration(kind, layer).name

        found: dict[str, dict[str, Tensor]] = {
            name("logits"): {"head_input": record.head_input[live]}
        }
        for layer in layers["hidden"]:
            found[name("hidden", layer)] = {"hidden": record.hidden[layer][live]}
        for layer in layers["attention"]:
            query, key = record.query[layer], record.key[layer]
            found[name("attention", layer)] = {
                "query": query.transpose(1, 2)[live],
                "key": key.transpose(1, 2)[live],
            }
        del record
        return super().forward(batch | {"features": found}, counts, factors, apart=apart)


class Held(StoreDataset):
    """One batch for every step; all rows are equally long, so any batch does."""

    held: dict[str, Any]

    def __getitems__(self, indices: list[int]) -> dict[str, Any]:
        """Return the batch."""
        return self.held


def status_bytes(key: str) -> int:
    """Return a line of /proc/self/status in bytes: VmRSS, VmHWM (its peak), VmPeak (addresses)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def capture_once(size: Size, root: Path, device: str) -> Path:
    """Write corpus and teacher, and capture."""
    longest = {"vocab": size.vocab, "longest": size.length}
    tokens = size.rows * size.length
    write_corpus(root / "tokens", train_tokens=tokens, shortest=size.length, **longest)
    shape = {"layers": size.layers, "width": size.width, "heads": size.heads}
    write_teacher(root / "teacher", **shape, **longest, dtype=torch.bfloat16)
    return capture(
        tokens=root / "tokens",
        teacher=root / "teacher",
        stores=root / "stores",
        signals=size.signals,
        blocks=[],
        options=SegmentOptions(
            segment_tokens=size.segment_rows * size.length, batch_tokens=2 * size.length
        ),
        nonfinite="stop",
        runtime=Runtime(device=device),
    )


def student(size: Size) -> LlamaForCausalLM:
    """Return the student, with as many heads as the teacher."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size.vocab,
            hidden_size=size.student_width,
            intermediate_size=3 * size.student_width,
            num_hidden_layers=len(size.maps),
            num_attention_heads=size.heads,
            num_key_value_heads=size.heads,
            max_position_embeddings=size.length,
            pad_token_id=PAD_ID,
            tie_word_embeddings=True,
        )
    )


def train(arm: str, size: Size, root: Path, device: torch.device, *, is_held: bool) -> list[float]:
    """Train a student for some steps by the real loop; return when each step ended.

    The loop has one step more, which is not taken: the last one writes a checkpoint.
    """
    terms = {term: {"weight": 1.0} for term in LEARNT[arm]}
    objective = Objective.model_validate(terms)
    reader = StoreReader(next((root / "stores").iterdir()))
    used = {"feature": "hidden", "attention": "attention", "output": "logits"}
    kinds = {used[term] for term in terms if term in used}
    names = [name for name in reader.signals if reader.signal(name).declaration.kind in kinds]
    kind = {"plain": Plain, "live": Beside}.get(arm, Distiller)
    features = (Widened if arm == "live" else TeacherFeatures)(reader, names)
    maps = {term: dict(size.maps) for term in ("feature", "attention")}
    distiller = kind(student(size), features, objective, maps, task="causal-lm")
    if isinstance(distiller, Beside):
        path = root / "teacher"
        reference = TeacherReference.load(path)
        loaded = load_teacher(path, reference, task="causal-lm", device=device, dtype=torch.float32)
        distiller.teacher = (loaded,)  # no submodule: it is not trained
    stored = [] if arm == "live" else names
    dataset = (Held if is_held else StoreDataset)(reader, stored, pool_segments=4)
    if isinstance(dataset, Held):
        dataset.held = StoreDataset(reader, stored).__getitems__(list(range(size.batch)))
    order = BatchOrder(
        dataset.segment, dataset.length, batch_size=size.batch, pool_segments=4, seed=0
    )
    options = TrainOptions(steps=size.steps + 1, batch_size=size.batch, save_every=10**6)
    arguments = training_arguments(options, root / "work", device.type)
    steps = StudentLoop(distiller, dataset, order, arguments, description=arm).steps()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew: building had its own
    next(steps)
    ends: list[float] = []
    for _ in range(size.steps):
        next(steps)
        if device.type == "cuda":
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
    return ends


def child(order: Mapping[str, Any]) -> dict[str, Any]:
    """Train one arm in this process and say what it took, or how it ended."""
    device, size = torch.device(order["device"]), Size(**order["size"])
    libraries = {"rss": status_bytes("VmRSS"), "addresses": status_bytes("VmSize")}
    cap = order["cap"]
    if cap and device.type == "cuda":
        whole = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(cap / whole)
    elif cap:
        resource.setrlimit(resource.RLIMIT_AS, (cap, cap))
    try:
        ends = train(order["arm"], size, Path(order["root"]), device, is_held=order["held"])
    except (DecantError, MemoryError, OSError, RuntimeError) as error:
        # What a missing allocation ends in depends on who asks.
        said = str(error).splitlines()[0].replace(f"{order['root']}/", "")
        return {"error": f"{type(error).__name__}: {said[:200]}"}
    on_gpu = device.type == "cuda"
    peak = torch.cuda.max_memory_allocated() if on_gpu else status_bytes("VmHWM")
    steps = len(ends) - 1
    return {
        "tokens_a_second": steps * size.batch * size.length / (ends[-1] - ends[0]),
        "peak_bytes": peak,
        "capped_bytes": peak if on_gpu else status_bytes("VmPeak"),
        "library_bytes": 0 if on_gpu else libraries["rss"],
        "library_capped_bytes": 0 if on_gpu else libraries["addresses"],
    }
