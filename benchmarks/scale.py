"""How capture scales: one worker process beside two, and what publishing for many would cost.

Run `python -m benchmarks.scale`: tables for people, and one JSON line last. Each process has one
thread of torch. A run's speed is that after each worker's first segment, so that starting processes
and loading teachers, which a real capture does once, stay outside; whole seconds stand beside it.
"""

import json
import os
import shutil
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.fsync import CHUNK_TOKENS, encoded, file_system, prepare
from benchmarks.synthetic import default_signals, machine, quiet, write_corpus, write_teacher
from pipeline.axes import TEST, TRAIN, VALIDATION
from pipeline.runtime import Runtime
from pipeline.store.commit import SignalWriter
from pipeline.store.forms.form import Geometry
from pipeline.store.forms.int8 import Int8
from pipeline.store.reader import StoreReader
from pipeline.store.records import Declaration
from pipeline.store.signals import Signal
from pipeline.teacher.capture.capture import capture
from pipeline.teacher.capture.spec import SegmentOptions
from pipeline.teacher.workers.workers import PUBLISHERS

COUNTS = (1, 2)
SIGNALS_A_SEGMENT = 7
"""Of a usual capture: three hidden states, three attentions, logits."""
ATTEMPT = "benchmark"
THREADS = (1, PUBLISHERS)
"""That publish: one, for comparison, and as many as a capture has."""


def capture_with(
    root: Path, layers: int, workers: int, options: SegmentOptions
) -> tuple[float, float, int, int]:
    """Capture with so many processes.

    Returns:
        Tokens a second after each worker's first segment, seconds in all, tokens and stored bytes.
    """
    begun = perf_counter()
    store = capture(
        tokens=root / "tokens",
        teacher=root / "teacher",
        stores=root / "stores",
        signals=default_signals(layers),
        blocks=[],
        options=options,
        nonfinite="stop",
        runtime=Runtime(device="cpu", scheduler="processes", workers=workers),
    )
    seconds = perf_counter() - begun
    reader = StoreReader(store)
    name = next(iter(reader.signals))
    numbers = list(reader.signal(name).receipts)
    lengths = reader.examples["length"]
    tokens = {n: int(lengths[reader.examples_in(n)].sum()) for n in numbers}
    # A segment is published when the last of its receipts is there.
    ended = {
        n: max(reader.layout.receipt(name, n).stat().st_mtime_ns for name in reader.signals) / 1e9
        for n in numbers
    }
    order = sorted(numbers, key=ended.__getitem__)
    first, rest = order[:workers], order[workers:]
    speed = sum(tokens[n] for n in rest) / (ended[order[-1]] - ended[first[-1]])
    size = sum(reader.signal(name).bytes for name in reader.signals)
    shutil.rmtree(root / "stores")
    return speed, seconds, sum(tokens.values()), size


def scaling(
    root: Path, *, tokens: int, layers: int, width: int, repetitions: int, segment_tokens: int
) -> dict[str, Any]:
    """Capture the same rows with one and with two processes, in turns."""
    write_corpus(root / "tokens", train_tokens=tokens)
    write_teacher(root / "teacher", layers=layers, width=width)
    options = SegmentOptions(segment_tokens=segment_tokens, batch_tokens=4096)
    speeds: dict[int, list[float]] = {count: [] for count in COUNTS}
    whole: dict[int, list[float]] = {count: [] for count in COUNTS}
    captured, size = 0, 0
    for number in range(repetitions):
        for count in COUNTS if number % 2 else reversed(COUNTS):
            speed, seconds, captured, size = capture_with(root, layers, count, options)
            speeds[count].append(speed)
            whole[count].append(seconds)
    ratios = [two / one for one, two in zip(*speeds.values(), strict=True)]
    return {
        "tokens": captured,
        "layers": layers,
        "width": width,
        "segment_tokens": segment_tokens,
        "repetitions": repetitions,
        "bytes_a_token": size / captured,
        "tokens_per_second": [statistics.median(speeds[count]) for count in COUNTS],
        "whole_seconds": [statistics.median(whole[count]) for count in COUNTS],
        "scaling": statistics.median(ratios),
        "scaling_lowest": min(ratios),
        "scaling_highest": max(ratios),
    }


def publishing(root: Path, *, segments: int, segment_tokens: int, width: int) -> dict[str, Any]:
    """Stage segments of signals as workers do, then publish them as the capture does."""
    layout, plan = prepare(root / "published", segments=segments, segment_tokens=segment_tokens)
    splits = (TRAIN, VALIDATION, TEST)
    writers = []
    for layer in range(SIGNALS_A_SEGMENT):
        signal = Signal(Int8(), layer)
        declared = Declaration.of(signal, Geometry(width=width), splits, {}, None)
        writers.append(SignalWriter(layout, plan, CHUNK_TOKENS, declared))
        writers[-1].declare()
    buffers = encoded(writers[0], width)
    layout.attempt(ATTEMPT).mkdir(parents=True)
    staging, size = 0.0, 0
    speeds: dict[int, list[float]] = {threads: [] for threads in THREADS}
    for number in writers[0].segments:
        for threads in THREADS if number % 2 else reversed(THREADS):
            begun = perf_counter()
            staged = [
                (writer, writer.stage_segment(number, buffers, rows="", attempt=ATTEMPT))
                for writer in writers
            ]
            staging += perf_counter() - begun
            size += sum(file["bytes"] for _, one in staged for file in one.files.values())
            with ThreadPoolExecutor(threads) as pool:
                begun = perf_counter()
                list(pool.map(lambda one: one[0].publish_segment(one[1], attempt=ATTEMPT), staged))
                speeds[threads].append(1 / (perf_counter() - begun))
    return {
        "file_system": file_system(root),
        "staged_bytes_per_second": size / staging,
        "published_segments_per_second": [statistics.median(speeds[n]) for n in THREADS],
    }


def tables(found: dict[str, Any]) -> list[Table]:
    """Lay the numbers out for people: what was measured, and where publishing would end."""
    shown = Table(box=None, header_style="bold")
    for heading in ("processes", "tokens/s", "times one", "efficiency", "whole seconds"):
        shown.add_column(heading, justify="right", no_wrap=True)
    rows = zip(COUNTS, found["tokens_per_second"], found["whole_seconds"], strict=True)
    for count, speed, seconds in rows:
        times = 1.0 if count == 1 else found["scaling"]
        shown.add_row(
            *(str(count), f"{speed:,.0f}", f"{times:.2f}", f"{times / count:.0%}", f"{seconds:.1f}")
        )
    limits = Table(box=None, header_style="bold")
    headings = [f"tokens/s at most, {threads} threads" for threads in THREADS]
    for heading in ("tokens a segment", *headings):
        limits.add_column(heading, justify="right", no_wrap=True)
    for size in sorted({found["segment_tokens"], 2**14, 2**16, 2**18}):
        most = [f"{one * size:,.0f}" for one in found["published_segments_per_second"]]
        limits.add_row(f"{size:,}", *most)
    return [shown, limits]


@click.command()
@click.option("--tokens", default=120_000, show_default=True, help="Training tokens.")
@click.option("--layers", default=4, show_default=True, help="Blocks of the teacher.")
@click.option("--width", default=256, show_default=True, help="Channels of the teacher.")
@click.option("--segment-tokens", default=4096, show_default=True, help="Tokens of a segment.")
@click.option("--segments", default=24, show_default=True, help="Segments to publish.")
@click.option("--repetitions", default=5, show_default=True, help="Pairs of captures.")
@click.option("--quick", is_flag=True, help="Little of all, to see that it works.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Where to write; by default the directory for temporary files.",
)
def main(
    tokens: int,
    layers: int,
    width: int,
    segment_tokens: int,
    segments: int,
    repetitions: int,
    quick: bool,
    directory: Path | None,
) -> None:
    """Measure what a second process brings, and what publishing costs the one that does it."""
    if quick:
        tokens, layers, width, segment_tokens, segments, repetitions = 8000, 2, 64, 1024, 6, 1
    torch.set_num_threads(1)
    quiet()
    with tempfile.TemporaryDirectory(dir=directory) as place:
        root = Path(place)
        load = os.getloadavg()[0]
        found = scaling(
            root,
            tokens=tokens,
            layers=layers,
            width=width,
            repetitions=repetitions,
            segment_tokens=segment_tokens,
        )
        found |= publishing(root, segments=segments, segment_tokens=segment_tokens, width=width)
    console = Console()
    console.print(
        f"{found['tokens']:,} tokens, {found['bytes_a_token']:,.0f} bytes each, in segments of "
        f"{segment_tokens:,}, one torch thread a process; load average before: {load:.1f}"
    )
    shown, limits = tables(found)
    console.print(shown)
    console.print(
        f"two over one: {found['scaling_lowest']:.2f} to {found['scaling_highest']:.2f} in "
        f"{repetitions} pairs"
    )
    published = " and ".join(f"{one:.1f}" for one in found["published_segments_per_second"])
    console.print(
        f"\non {found['file_system'] or 'an unknown file system'} a worker stages "
        f"{found['staged_bytes_per_second'] / 1e6:.0f} MB/s, and the capture publishes {published} "
        f"segments of {SIGNALS_A_SEGMENT} signals a second with {THREADS[0]} and {THREADS[1]} "
        "threads:"
    )
    console.print(limits)
    kept = ("scaling", "tokens_per_second", "published_segments_per_second", "bytes_a_token")
    line = {
        "benchmark": "scale",
        "figures": {
            "efficiency_of_two": found["scaling"] / 2,
            **{key: found[key] for key in kept},
        },
        **found,
        "load_average": load,
        "machine": machine(),
    }
    click.echo(json.dumps(line))


if __name__ == "__main__":
    main()
