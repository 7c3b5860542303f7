"""What a GPU does with all of this: values against the CPU's, steps, captures, waits and peaks.

Run `python -m benchmarks.gpu --output DIR` on a machine with CUDA: a JSON line for each step goes
to DIR/gpu.jsonl, with the machine. A step that is there already is not run again, one that fails
leaves its error and stops no other, and none begins that would not end within `--minutes`. `--tiny`
runs the same steps with small sizes on the CPU: it shows that they work and measures nothing.
"""

import contextlib
import gc
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.large import Size, Subject, measured
from benchmarks.synthetic import machine, quiet
from pipeline.store.forms.form import Channels, Form, Tap
from pipeline.store.forms.registry import build_form, forms_of
from pipeline.store.reader import StoreReader
from pipeline.store.signals import Signal
from pipeline.student.align.distiller import Distiller, term_counts
from pipeline.student.align.objective import Objective
from pipeline.student.data.features import TeacherFeatures
from pipeline.student.data.stream import StoreDataset

HALF_BILLION = Size(24, 896, 4864, 14, 2, 151_936, "cuda", "bfloat16", 64, "auto")
"""0.5 B parameters, the sizes of Qwen2.5-0.5B."""
SEVEN_BILLION = Size(32, 4096, 14_336, 32, 8, 32_000, "cuda", "bfloat16", 32, "auto")
TINY = Size(3, 32, 64, 4, 2, 64, "cpu", "float32", 4, 2048)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPS_GIB = (12, 8)
ROWS = 64


class Mixed(Size):
    """A tiny teacher with a layer for each form."""

    @property
    def signals(self) -> list[Signal]:
        """Hidden states, attention and values of three layers in several forms, and logits."""
        layers = {
            1: [("hidden", "int8"), ("attention", "qk"), ("value", "int8")],
            2: [("hidden", "fp8"), ("attention", "map")],
            3: [("hidden", "bfloat16"), ("attention", "qk")],
        }
        logits = [("head", {}), ("topk", {"k": 8}), ("sampled", {"n": 8})]
        return [
            *(Signal(build_form(k, f, {}), n) for n, forms in layers.items() for k, f in forms),
            *(Signal(build_form("logits", name, options), None) for name, options in logits),
        ]


ON = {"weight": 1.0}
TERMS: dict[str, tuple[dict[str, Any], dict[int, int], tuple[str, ...]]] = {
    "feature int8": ({"feature": ON}, {1: 1}, ("hidden/1/int8",)),
    "feature fp8": ({"feature": ON}, {2: 2}, ("hidden/2/fp8",)),
    "feature bfloat16": (
        {"feature": ON | {"skip_first_token": True}},
        {3: 3},
        ("hidden/3/bfloat16",),
    ),
    "attention": ({"attention": ON}, {1: 1}, ("attention/1/qk",)),
    "relations": ({"attention": ON | {"loss": "relations"}}, {1: 1}, ("attention/1/qk", "value/1")),
    "map": ({"attention": ON | {"loss": "head_mean"}}, {2: 2}, ("attention/2/map",)),
    "head": ({"output": ON}, {}, ("logits/head",)),
    "topk": ({"output": ON}, {}, ("logits/topk",)),
    "sampled": ({"output": ON}, {}, ("logits/sampled",)),
    "labels": ({"labels": ON}, {}, ()),
}
"""By name: the objective, the layer map, and the beginnings of the signals' names."""
ALL = ("feature", "attention", "output", "labels")


@dataclass(frozen=True)
class Sizes:
    """What the steps run with."""

    device: torch.device
    half_billion: Size
    seven_billion: Size
    length: int
    laps: int


def synchronize(device: torch.device) -> None:
    """Wait for the GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def milliseconds(device: torch.device, run: Callable[[], object], laps: int) -> float:
    """Return the median time of a call, after two to warm up."""
    times = []
    for lap in range(laps + 2):
        started = time.perf_counter()
        run()
        synchronize(device)
        if lap >= 2:
            times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times)


def described(sizes: Sizes) -> dict[str, Any]:
    """Return what decides the speed: versions, GPU, backends of attention, TF32."""
    found: dict[str, Any] = {"torch": torch.__version__}
    if sizes.device.type == "cuda":
        backends = torch.backends.cuda
        found |= {
            "gpu": torch.cuda.get_device_name(),
            "memory_gib": torch.cuda.get_device_properties(0).total_memory / 2**30,
            "cudnn": torch.backends.cudnn.version(),
            "tf32": backends.matmul.allow_tf32,
            **{
                f"sdp_{name}": getattr(backends, f"{name}_sdp_enabled")()
                for name in ("flash", "mem_efficient", "math", "cudnn")
            },
        }
    return found


def example_of(form: Form) -> dict[str, Tensor]:
    """Return float32 values that a form encodes."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    match form.tap:
        case Tap.QUERY_KEY:
            return {"query": normal(ROWS, 4, 64), "key": normal(ROWS, 2, 64)}
        case Tap.VALUE:
            return {"value": normal(ROWS, 2, 64)}
        case Tap.ATTENTION_MAP:
            return {"probability": normal(ROWS, 4).softmax(0)}
        case Tap.LOGITS:
            return {"logits": 3 * normal(ROWS, 8192)}
        case Tap.HEAD_INPUT:
            return {"head_input": normal(ROWS, 256)}
        case _:
            return {"hidden": normal(ROWS, 256)}


def forms(sizes: Sizes) -> dict[str, Any]:
    """Return each form's largest error on the device in units of the stated one, by dtype."""
    found: dict[str, Any] = {}
    for kind in ("hidden", "attention", "value", "logits"):
        for name in forms_of(kind):
            form = build_form(kind, name, {})
            if form.tap is Tap.LAYER_BELOW:
                continue
            for dtype in DTYPES:
                values = {key: v.to(dtype).float() for key, v in example_of(form).items()}
                there = {key: value.to(sizes.device) for key, value in values.items()}
                width = next(iter(values.values())).shape[-1]
                channels = None
                if form.needs_channels:
                    zeros = torch.zeros(width, device=sizes.device)
                    channels = Channels(zeros, zeros + 1)
                decoded = form.decode(form.encode(there, channels), channels)
                errors = form.errors(there, decoded, channels)
                share = max(
                    float((error.found / error.stated).nan_to_num(0).max())
                    for error in errors.values()
                )
                found.setdefault(f"{kind} {name}", {})[str(dtype)[6:]] = share
    return found


@contextlib.contextmanager
def captured(size: Size, length: int) -> Iterator[StoreReader]:
    """Capture a random teacher; the store is there until the block ends."""
    with tempfile.TemporaryDirectory() as directory:
        subject = Subject(size, length, Path(directory))
        del subject
        gc.collect()
        (store,) = (path for path in Path(directory, "stores").iterdir() if path.is_dir())
        yield StoreReader(store)


def distiller_of(
    reader: StoreReader, size: Size, objective: Objective, maps: dict[int, int], names: list[str]
) -> Distiller:
    """Return a student of the teacher's size, the same at every call."""
    torch.manual_seed(0)
    student = AutoModelForCausalLM.from_config(size.config(reader.plan["max_length"]))
    features = TeacherFeatures(reader, names)
    both = {"feature": maps, "attention": maps}
    return Distiller(student, features, objective, both, task="causal-lm").eval()


def moved(value: Any, device: torch.device) -> Any:
    """Return a batch on a device."""
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    return value.to(device)


def gradient_of(
    distiller: Distiller, batch: Any, device: torch.device, dtype: torch.dtype
) -> tuple[float, Tensor]:
    """Return the loss of a batch and its gradient, flat and on the CPU."""
    distiller.to(device)
    counts = term_counts(batch, distiller.objective, task="causal-lm")
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        loss = distiller(moved(batch, device), counts).total
    loss.backward()
    gradients = [p.grad for p in distiller.parameters() if p.grad is not None]
    return loss.item(), torch.cat([g.flatten().float().cpu() for g in gradients])


def terms(sizes: Sizes) -> dict[str, Any]:
    """Return each term's difference from the CPU's float32, of the loss and of the gradient."""
    found: dict[str, Any] = {}
    size = Mixed(**vars(TINY))
    with captured(size, 256) as reader:
        for name, (goal, maps, begins) in TERMS.items():
            names = [n for n in reader.signals if n.startswith(begins or "none")]
            batch = StoreDataset(reader, names).__getitems__([0, 1])
            build = partial(distiller_of, reader, size, Objective.model_validate(goal), maps, names)
            exact, wanted = gradient_of(build(), batch, torch.device("cpu"), torch.float32)
            for dtype in DTYPES:
                loss, gradient = gradient_of(build(), batch, sizes.device, dtype)
                found.setdefault(name, {})[str(dtype)[6:]] = {
                    "loss": abs(loss - exact) / abs(exact),
                    "gradient": float((gradient - wanted).norm() / wanted.norm()),
                }
    return found


def waits_of(device: torch.device, run: Callable[[], object]) -> int | None:
    """Return how often a call waits for the GPU, as torch itself warns."""
    if device.type != "cuda":
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in caught)


def kernels_of(device: torch.device, run: Callable[[], object]) -> dict[str, float]:
    """Return the kernel launches of a call, and the share of its time that they run."""
    if device.type != "cuda":
        return {}
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        started = time.perf_counter()
        run()
        synchronize(device)
        seconds = time.perf_counter() - started
    kernels = [e for e in profile.events() or () if e.device_type.name == "CUDA"]
    busy = sum(event.device_time for event in kernels) / 1e6
    return {"launches": len(kernels), "busy": busy / seconds}


def steps_of(distiller: Distiller, batch: Any, device: torch.device) -> Callable[[], None]:
    """Return a function that takes an optimiser step in bfloat16."""
    counts = term_counts(batch, distiller.objective, task="causal-lm")
    distiller.to(device).train()
    trained = [p for p in distiller.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=device.type == "cuda")
    here = moved(batch, device)

    def run() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = distiller(here, counts).total
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return run


def step(sizes: Sizes) -> dict[str, Any]:
    """Return what an optimiser step of a 0.5 B student takes: labels, each term, and all."""
    found: dict[str, Any] = {}
    device, size = sizes.device, sizes.half_billion
    layers = {signal.layer: signal.layer for signal in size.signals if signal.layer}
    with captured(size, sizes.length) as reader:
        names = list(reader.signals)
        dataset = StoreDataset(reader, names)
        batch = dataset.__getitems__(list(range(min(8, len(dataset)))))
        for chosen in (("labels",), *((term,) for term in ALL[:3]), ALL):
            objective = Objective.model_validate(dict.fromkeys(chosen, ON))
            run = steps_of(distiller_of(reader, size, objective, layers, names), batch, device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            figures = {"ms": milliseconds(device, run, sizes.laps), "waits": waits_of(device, run)}
            if device.type == "cuda":
                figures["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
            found["+".join(chosen)] = figures | kernels_of(device, run)
            del run
            gc.collect()
    return found | {"tokens": int(batch["attention_mask"].sum())}


def attention(sizes: Sizes) -> dict[str, Any]:
    """Return the first and second call at lengths never seen, with and without cuDNN."""
    device, found = sizes.device, {}
    for is_cudnn in (True, False):
        if device.type == "cuda":
            torch.backends.cuda.enable_cudnn_sdp(is_cudnn)
        calls: list[list[float]] = []
        for number in range(8):
            length = 160 + 7 * number + (3 if is_cudnn else 0)
            dtype = torch.bfloat16
            query = torch.randn(8, 14, length, 64, device=device, dtype=dtype, requires_grad=True)
            key = torch.randn(8, 14, length, 64, device=device, dtype=dtype)
            times = []
            for _ in range(2):
                started = time.perf_counter()
                out = torch.nn.functional.scaled_dot_product_attention(
                    query, key, key, is_causal=True
                )
                out.sum().backward()
                synchronize(device)
                times.append(1e3 * (time.perf_counter() - started))
            calls.append(times)
        first, second = np.median(calls[1:], axis=0)
        found["cudnn" if is_cudnn else "without"] = {"first_ms": first, "second_ms": second}
    if device.type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(True)
    return found


def head(sizes: Sizes) -> dict[str, Any]:
    """Return time and error of the teacher's head in float32, TF32 and bfloat16."""
    size = sizes.seven_billion
    torch.manual_seed(0)
    inputs = torch.randn(1024, size.width, device=sizes.device)
    weight = torch.randn(size.vocab, size.width, device=sizes.device) / size.width**0.5
    exact = inputs @ weight.T
    found = {}
    for name in ("float32", "tf32", "bfloat16"):
        torch.backends.cuda.matmul.allow_tf32 = name == "tf32"
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        x, w = inputs.to(dtype), weight.to(dtype)
        product = partial(torch.matmul, x, w.T)
        error = float((product().float() - exact).norm() / exact.norm())
        found[name] = {"ms": milliseconds(sizes.device, product, sizes.laps), "error": error}
    torch.backends.cuda.matmul.allow_tf32 = False
    return found


def captures(which: str, sizes: Sizes) -> dict[str, Any]:
    """Return a capture over the forward pass below the head, by the number of writers."""
    size = getattr(sizes, which)
    return {
        str(writers): measured(size, sizes.length, sizes.laps, writers=writers)
        for writers in (0, 1, 4, 8)
    }


def capped(sizes: Sizes) -> dict[str, Any]:
    """Return whether a student, and a teacher of 7 B, fit under caps of the GPU's memory."""
    if sizes.device.type != "cuda":
        return {"student": step(sizes)}
    total = torch.cuda.get_device_properties(0).total_memory
    found: dict[str, Any] = {}
    for cap in CAPS_GIB:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(cap * 2**30 / total)
        try:
            found[str(cap)] = {"student": step(sizes)["+".join(ALL)]}
            try:
                with torch.device(sizes.device):
                    AutoModelForCausalLM.from_config(
                        sizes.seven_billion.config(sizes.length), dtype=torch.bfloat16
                    )
                found[str(cap)]["teacher"] = "fits"
            except torch.OutOfMemoryError as error:
                found[str(cap)]["teacher"] = str(error)[:120]
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
    return found


STEPS: dict[str, tuple[float, Callable[[Sizes], dict[str, Any]]]] = {
    "machine": (0.1, described),
    "forms": (0.3, forms),
    "terms": (0.7, terms),
    "step": (1.5, step),
    "capture 0.5 B": (1.5, partial(captures, "half_billion")),
    "attention": (0.5, attention),
    "head": (0.2, head),
    "capture 7 B": (2.5, partial(captures, "seven_billion")),
    "capped": (1.5, capped),
}
"""By name, in the order of what matters: the minutes that a step may take, and the step."""


@click.command()
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True)
@click.option("--minutes", default=9.0, show_default=True, help="No step begins that ends later.")
@click.option("--step", "only", multiple=True, type=click.Choice(list(STEPS)), help="Only this.")
@click.option("--tiny", is_flag=True, help="Small sizes on the CPU: shows that the steps work.")
def main(output: Path, minutes: float, only: tuple[str, ...], tiny: bool) -> None:
    """Measure on a GPU; a JSON line for each step goes to OUTPUT/gpu.jsonl."""
    quiet()
    if not tiny and not torch.cuda.is_available():
        raise click.UsageError("no CUDA device, expected one; or give --tiny")
    sizes = Sizes(torch.device("cuda", 0), HALF_BILLION, SEVEN_BILLION, 512, 5)
    if tiny:
        sizes = Sizes(torch.device("cpu"), TINY, TINY, 256, 1)
    output.mkdir(parents=True, exist_ok=True)
    path = output / "gpu.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    done = {line["step"] for line in map(json.loads, lines) if "error" not in line}
    started = time.monotonic()
    for name, (most, run) in STEPS.items():
        if only and name not in only:
            continue
        left = minutes - (time.monotonic() - started) / 60
        if name in done or left < most:
            click.echo(f"{name}: {'there already' if name in done else 'no time left'}", err=True)
            continue
        begun = time.monotonic()
        try:
            found: dict[str, Any] = {"figures": run(sizes)}
        except Exception as error:  # noqa: BLE001 - the other steps go on
            found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
        gc.collect()
        if sizes.device.type == "cuda":
            torch.cuda.empty_cache()
        line = {"step": name, "seconds": round(time.monotonic() - begun, 1), **found}
        with path.open("a") as file:
            file.write(json.dumps(line | {"machine": machine()}, default=float) + "\n")
        click.echo(json.dumps(line, default=float))


if __name__ == "__main__":
    main()
