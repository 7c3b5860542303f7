"""What capturing a large teacher costs beside its bare forward pass, on short rows and long ones.

Run `python -m benchmarks.large`: a table for people, and one JSON line last. A randomly initialised
Llama, for speed needs no training: of about 7 B in bfloat16 where there is CUDA, of about 0.3 B in
float32 on a CPU. Forward and capture take turns over the same batches; what a capture does once
(the check of the taps, statistics, the trial of batches) is told apart.
"""

import json
import logging
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.synthetic import PAD_ID, Stopwatch, machine, quiet, stopwatch, write_corpus
from pipeline.runtime import Runtime
from pipeline.store.forms.registry import build_form
from pipeline.store.reader import StoreReader
from pipeline.store.signals import Signal
from pipeline.taps.inputs import run_base
from pipeline.teacher.capture import capture as module
from pipeline.teacher.capture.capture import capture
from pipeline.teacher.capture.forward import Batch, segment_batches
from pipeline.teacher.capture.spec import SegmentOptions, planned_batch_tokens
from pipeline.teacher.source.reference import TeacherReference


@dataclass(frozen=True)
class Size:
    """A Llama, where it runs, and how many rows of 512 tokens are run in a lap."""

    layers: int
    width: int
    inner: int
    heads: int
    kv_heads: int
    vocab: int
    device: str
    dtype: str
    rows: int
    batch_tokens: Any

    def config(self, length: int) -> LlamaConfig:
        """Return the configuration for rows of a length."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.width,
            intermediate_size=self.inner,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=length,
            pad_token_id=PAD_ID,
            tie_word_embeddings=False,
        )

    @property
    def signals(self) -> list[Signal]:
        """Three hidden states, three attentions, and logits as the head's input."""
        kept = sorted({self.layers // 3, 2 * self.layers // 3, self.layers})
        return [
            *(Signal(build_form("hidden", "int8", {}), layer) for layer in kept),
            *(Signal(build_form("attention", "qk", {}), layer) for layer in kept),
            Signal(build_form("logits", "head", {}), None),
        ]


GPU = Size(32, 4096, 14_336, 32, 8, 32_000, "cuda", "bfloat16", 128, "auto")
CPU = Size(24, 1024, 2816, 16, 8, 32_000, "cpu", "float32", 1, 2048)
QUICK = Size(6, 384, 1024, 6, 2, 8000, "cpu", "float32", 4, 2048)


def peak_bytes(device: str, *, reset: bool = False) -> int:
    """Return the most memory since the last reset: of the GPU, or of this process."""
    if device == "cuda":
        if reset:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated()
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def timed(device: str, run: Callable[[], object]) -> tuple[Stopwatch, int]:
    """Run once; return what it took and the most memory there was."""
    peak_bytes(device, reset=True)
    with stopwatch() as watch:
        run()
        if device == "cuda":
            torch.cuda.synchronize()
    return watch, peak_bytes(device)


class Subject:
    """A teacher of a size, captured once, and both ways to run it again over the same batches."""

    def __init__(self, size: Size, length: int, root: Path, *, writers: int = 0) -> None:
        self.size, self._writers = size, writers
        config = size.config(length)
        torch.manual_seed(0)
        with torch.device(size.device):
            model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, size.dtype))
        self.model: PreTrainedModel = model.eval().requires_grad_(False)
        self.model.config.use_cache = False
        self.parameters = sum(parameter.numel() for parameter in self.model.parameters())
        rows = max(1, size.rows * 512 // length) * length
        write_corpus(
            root / "tokens", train_tokens=rows, vocab=size.vocab, shortest=length, longest=length
        )
        reference = TeacherReference(
            "model", None, False, "0" * 64, size.layers, config.to_dict(), trained=True
        )
        (root / "teacher").mkdir()
        reference.save(root / "teacher")
        self._job: tuple[Any, ...] = ()
        with stopwatch() as watch:
            store = self._capture(root, length)
        self.once_seconds = watch.seconds
        reader = StoreReader(store)
        self.batch_tokens = planned_batch_tokens(reader.plan)
        self.tokens = int(reader.examples["length"].sum())
        self.bytes_a_token = sum(
            reader.signal(name).bytes / reader.signal(name).tokens for name in reader.signals
        )
        self.batches: Sequence[Batch] = [
            batch
            for number in range(len(reader.plan["segments"]))
            for batch in segment_batches(
                reader.read_segment(number), self.batch_tokens, PAD_ID, torch.device(size.device)
            )
        ]

    def _capture(self, root: Path, length: int) -> Path:
        """Capture all but the segments, which are kept to be run in laps, and those once."""
        plain, load = module.run_here, module.load_teacher

        def keep(*job: Any) -> None:
            self._job = job
            plain(*job)

        module.run_here, module.load_teacher = keep, lambda *_, **__: self.model
        try:
            return capture(
                tokens=root / "tokens",
                teacher=root / "teacher",
                stores=root / "stores",
                signals=self.size.signals,
                blocks=[],
                options=SegmentOptions(
                    # On a CPU a row a segment: the taps are checked on no more than a segment.
                    segment_tokens=length if self.size.device == "cpu" else 16 * length,
                    batch_tokens=self.size.batch_tokens,
                    dtype=self.size.dtype,
                ),
                nonfinite="stop",
                runtime=Runtime(device=self.size.device, writers=self._writers),
            )
        finally:
            module.run_here, module.load_teacher = plain, load

    @torch.inference_mode()
    def forward(self) -> None:
        """Run all below the head, outputs dropped, as the form `head` needs it."""
        for batch in self.batches:
            run_base(self.model, {"input_ids": batch.inputs["input_ids"], "use_cache": False})

    def capture(self) -> None:
        """Capture every segment again, to a durable store."""
        module.run_here(*self._job)


def measured(size: Size, length: int, laps: int, *, writers: int = 0) -> dict[str, Any]:
    """Return the numbers for rows of a length."""
    with tempfile.TemporaryDirectory() as directory:
        subject = Subject(size, length, Path(directory), writers=writers)
        arms = {"forward": subject.forward, "capture": subject.capture}
        found: dict[str, list[tuple[Stopwatch, int]]] = {name: [] for name in arms}
        for lap in range(laps + 1):
            for name in list(arms)[:: -1 if lap % 2 else 1]:
                one = timed(size.device, arms[name])
                if lap:  # the first is for warming up
                    found[name].append(one)
    seconds = {name: [watch.seconds for watch, _ in runs] for name, runs in found.items()}
    ratios = [c / f for c, f in zip(seconds["capture"], seconds["forward"], strict=True)]
    return {
        "parameters": subject.parameters,
        "tokens": subject.tokens,
        "batch_tokens": subject.batch_tokens,
        **{
            f"{name}_tokens_a_second": subject.tokens / statistics.median(values)
            for name, values in seconds.items()
        },
        "wall_over_forward": {
            "median": statistics.median(ratios),
            "least": min(ratios),
            "most": max(ratios),
        },
        **{f"{name}_peak_bytes": max(peak for _, peak in runs) for name, runs in found.items()},
        "bytes_a_token": subject.bytes_a_token,
        "once_seconds": subject.once_seconds - statistics.median(seconds["capture"]),
    }


def table(found: dict[str, dict[str, Any]]) -> Table:
    """Lay the numbers out for people."""
    shown = Table(box=None, header_style="bold")
    headings = ("tokens/s", "captured/s", "wall ratio", "GB", "GB capturing", "B/token", "once s")
    for heading in ("tokens a row", *headings):
        shown.add_column(heading, justify="right", no_wrap=True)
    for length, one in found.items():
        shown.add_row(
            length,
            f"{one['forward_tokens_a_second']:,.0f}",
            f"{one['capture_tokens_a_second']:,.0f}",
            "{median:.3f} ({least:.2f}-{most:.2f})".format(**one["wall_over_forward"]),
            *(f"{one[f'{name}_peak_bytes'] / 1e9:.2f}" for name in ("forward", "capture")),
            f"{one['bytes_a_token']:,.0f}",
            f"{one['once_seconds']:.0f}",
        )
    return shown


@click.command()
@click.option("--laps", default=3, show_default=True, help="Counted runs of each arm.")
@click.option("--quick", is_flag=True, help="A small teacher on the CPU, in a minute or two.")
def main(laps: int, quick: bool) -> None:
    """Measure what capturing a large teacher costs."""
    logging.basicConfig(level="WARNING")
    quiet()
    size = QUICK if quick else GPU if torch.cuda.is_available() else CPU
    found = {str(length): measured(size, length, laps) for length in (512, 2048)}
    Console(width=120).print(
        f"a Llama of {found['512']['parameters'] / 1e9:.2f} B in {size.dtype} on {size.device}; "
        f"three hidden states (int8), three attentions (qk), logits (head); {laps} laps"
    )
    Console(width=120).print(table(found))
    figures = {f"large_{length}_{k}": v for length, one in found.items() for k, v in one.items()}
    click.echo(json.dumps({"figures": figures, "size": asdict(size), "machine": machine()}))


if __name__ == "__main__":
    main()
