"""What a benchmark of capturing compares: the teacher alone, ours, and what one writes by hand.

An arm is a process of its own, so that its peak of memory is its own; it answers orders, so that
the arms take turns and none has a quiet machine to itself.
"""

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.synthetic import quiet, stopwatch
from benchmarks.turns import serve
from pipeline.runtime import Runtime
from pipeline.store.forms.registry import build_form
from pipeline.store.reader import StoreReader
from pipeline.store.signals import Signal
from pipeline.taps.inputs import run_base
from pipeline.teacher.capture import capture as module
from pipeline.teacher.capture.capture import capture
from pipeline.teacher.capture.forward import Batch, segment_batches
from pipeline.teacher.capture.spec import SegmentOptions
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.source.reference import TeacherReference

CPU = torch.device("cpu")
TOP = 64


@dataclass(frozen=True)
class Setting:
    """What all arms share: the files below `root`, the layers kept, and the rows of a batch."""

    root: str
    layers: tuple[int, ...]
    segment_tokens: int
    batch_tokens: int

    @property
    def options(self) -> SegmentOptions:
        """How a capture deals the corpus."""
        return SegmentOptions(segment_tokens=self.segment_tokens, batch_tokens=self.batch_tokens)

    def signals(self, logits: str) -> list[Signal]:
        """Return hidden states and attention of the layers, and logits in one form."""
        int8, qk = build_form("hidden", "int8", {}), build_form("attention", "qk", {})
        options = {"k": TOP} if logits == "topk" else {}
        return [
            *(Signal(int8, layer) for layer in self.layers),
            *(Signal(qk, layer) for layer in self.layers),
            Signal(build_form("logits", logits, options), None),
        ]


@dataclass(frozen=True)
class Lap:
    """One run of an arm over the corpus; `once` is what does not grow with it."""

    seconds: float
    cpu_seconds: float
    bytes: int
    once_seconds: float = 0.0
    once_cpu_seconds: float = 0.0


class Arm:
    """A loaded teacher, the batches of a corpus, and a way to keep what it says of them."""

    def __init__(self, name: str, setting: Setting) -> None:
        self._run: Callable[[], Lap] = getattr(self, f"_{name}")
        self._setting = setting
        self._root = Path(setting.root)
        self._out = self._root / "out" / name
        attention = "eager" if name == "eager" else None
        reference = TeacherReference.load(self._root / "teacher")
        self._model: PreTrainedModel = load_teacher(
            self._root / "teacher", reference, task="causal-lm", device=CPU, dtype=torch.float32
        )
        if attention:
            self._model.set_attn_implementation(attention)
        self._batches = list(batches_of(self._root, setting)) if name[:4] != "ours" else []

    def lap(self) -> Lap:
        """Run once over the corpus, into an empty directory."""
        shutil.rmtree(self._out, ignore_errors=True)
        self._out.mkdir(parents=True)
        found = self._run()
        shutil.rmtree(self._out)
        return found

    def _forward(self, *, logits: bool = True) -> None:
        with torch.inference_mode():
            for batch in self._batches:
                ids = {"input_ids": batch.inputs["input_ids"], "use_cache": False}
                self._model(**ids) if logits else run_base(self._model, ids)

    def _base(self) -> Lap:
        """Run all below the head, outputs dropped: what capturing the form head needs."""
        with stopwatch() as watch:
            self._forward(logits=False)
        return Lap(watch.seconds, watch.cpu_seconds, 0)

    def _full(self) -> Lap:
        """Run the model as it comes, logits and all, outputs dropped."""
        with stopwatch() as watch:
            self._forward()
        return Lap(watch.seconds, watch.cpu_seconds, 0)

    def _ours_head(self) -> Lap:
        return self._ours("head")

    def _ours_topk(self) -> Lap:
        return self._ours("topk")

    def _ours(self, logits: str) -> Lap:
        """Capture for real, to a durable store; the teacher is there already."""
        inner: dict[str, Any] = {}
        plain, load = module.run_here, module.load_teacher

        def timed(*args: Any, **kwargs: Any) -> None:
            with stopwatch() as inner["watch"]:
                plain(*args, **kwargs)

        module.run_here = timed
        module.load_teacher = lambda *args, **kwargs: self._model
        try:
            with stopwatch() as watch:
                store = capture(
                    tokens=self._root / "tokens",
                    teacher=self._root / "teacher",
                    stores=self._out,
                    signals=self._setting.signals(logits),
                    blocks=[],
                    options=self._setting.options,
                    nonfinite="stop",
                    runtime=Runtime(device="cpu"),
                )
        finally:
            module.run_here, module.load_teacher = plain, load
        reader, per = StoreReader(store), inner["watch"]
        stored = sum(reader.signal(name).bytes for name in reader.signals)
        return Lap(
            per.seconds,
            per.cpu_seconds,
            stored,
            watch.seconds - per.seconds,
            watch.cpu_seconds - per.cpu_seconds,
        )

    def _by_hand(self, save: Callable[[int, Batch, Any], None], **asked: bool) -> Lap:
        with stopwatch() as watch, torch.inference_mode():
            for number, batch in enumerate(self._batches):
                inputs = {name: batch.inputs[name] for name in ("input_ids", "attention_mask")}
                save(number, batch, self._model(**inputs, use_cache=False, **asked))
        stored = sum(path.stat().st_size for path in self._out.rglob("*") if path.is_file())
        return Lap(watch.seconds, watch.cpu_seconds, stored)

    def _eager(self) -> Lap:
        """All layers and maps asked for, the chosen ones saved in float16 a batch."""

        def save(number: int, batch: Batch, output: Any) -> None:
            top = output.logits.log_softmax(-1).topk(TOP, dim=-1)
            kept = {
                "hidden": [output.hidden_states[layer].half() for layer in self._setting.layers],
                "maps": [output.attentions[layer - 1].half() for layer in self._setting.layers],
                "log_probs": top.values.half(),
                "ids": top.indices.int(),
            }
            torch.save(kept, self._out / f"{number}.pt")

        return self._by_hand(save, output_hidden_states=True, output_attentions=True)

    def _safetensors(self) -> Lap:
        """A file a sample: chosen hidden states and the head's input in float16, no attention."""

        def save(number: int, batch: Batch, output: Any) -> None:
            states = [output.hidden_states[layer] for layer in (*self._setting.layers, -1)]
            for row, count in enumerate(batch.live.sum(-1).tolist()):
                kept = torch.stack([state[row, :count] for state in states]).half()
                save_file({"hidden_states": kept}, self._out / f"{number}-{row}.safetensors")

        return self._by_hand(save, output_hidden_states=True)

    def _dask(self) -> Lap:
        """The same values, each layer one array by `dask.array.to_zarr` as it comes."""
        kept: list[list[Tensor]] = [[] for _ in (*self._setting.layers, -1)]

        def save(number: int, batch: Batch, output: Any) -> None:
            for layer, rows in zip((*self._setting.layers, -1), kept, strict=True):
                rows.append(output.hidden_states[layer].half()[batch.live])
            if number == len(self._batches) - 1:
                for place, rows in enumerate(kept):
                    values = np.concatenate([part.numpy() for part in rows])
                    da.to_zarr(da.from_array(values), self._out / f"{place}.zarr")

        return self._by_hand(save, output_hidden_states=True)


def batches_of(root: Path, setting: Setting) -> Sequence[Batch]:
    """Return the batches of the capture that `root / "plan"` holds, in its order."""
    (store,) = (path for path in (root / "plan").iterdir() if path.is_dir())
    reader = StoreReader(store)
    numbers = range(len(reader.plan["segments"]))
    return [
        batch
        for number in numbers
        for batch in segment_batches(
            reader.read_segment(number), setting.batch_tokens, reader.plan["pad_id"], CPU
        )
    ]


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    quiet()
    arm = Arm(sys.argv[1], Setting(**{**given, "layers": tuple(given["layers"])}))
    serve(lambda order: asdict(arm.lap()))
