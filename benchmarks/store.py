"""What the store costs: capture beside the teacher alone, reading beside a memory map.

Run `python -m benchmarks.store`: a table for people, and one JSON line last. Random data of the
shapes of the default pipeline; seconds hold for one machine, the ratios travel better.
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.synthetic import (
    Stopwatch,
    default_signals,
    machine,
    quiet,
    stopwatch,
    write_corpus,
    write_teacher,
)
from pipeline.axes import TRAIN, Axis
from pipeline.runtime import Runtime
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.store.signals import Signal
from pipeline.student.data.batch_order import BatchOrder
from pipeline.student.data.stream import StoreDataset
from pipeline.taps.inputs import model_inputs
from pipeline.teacher.capture.capture import capture
from pipeline.teacher.capture.complete import is_complete
from pipeline.teacher.capture.forward import segment_batches
from pipeline.teacher.capture.spec import SegmentOptions
from pipeline.teacher.source.load import load_teacher
from pipeline.teacher.source.reference import TeacherReference

BATCH_SIZE = 32
POOL_SEGMENTS = 4
CPU = torch.device("cpu")


def timed_capture(
    root: Path, signals: Sequence[Signal], options: SegmentOptions
) -> tuple[Path, int, Stopwatch]:
    """Time a whole capture, from loading the teacher to the index; return store and tokens."""
    with stopwatch() as watch:
        store = capture(
            tokens=root / "tokens",
            teacher=root / "teacher",
            stores=root / "stores",
            signals=signals,
            blocks=[],
            options=options,
            nonfinite="stop",
            runtime=Runtime(device="cpu"),
        )
    return store, int(StoreReader(store).examples["length"].sum()), watch


def teacher_alone(store: Path, teacher: Path, options: SegmentOptions) -> Stopwatch:
    """Time the teacher, loaded, over the rows that were captured, in the same batches."""
    reader = StoreReader(store)
    reference = TeacherReference.load(teacher)
    with stopwatch() as watch, torch.inference_mode():
        model = load_teacher(teacher, reference, task="causal-lm", device=CPU, dtype=torch.float32)
        for number in range(len(reader.plan["segments"])):
            segment = reader.read_segment(number)
            pad_id = reader.plan["pad_id"]
            for batch in segment_batches(segment, options.batch_tokens, pad_id, CPU):
                model(**model_inputs(batch.inputs, is_causal=True))
    return watch


def read_epoch(reader: StoreReader, signals: Sequence[str]) -> tuple[Stopwatch, list[list[int]]]:
    """Time one epoch of training batches with all their features; return its order, too."""
    with stopwatch() as watch:
        dataset = StoreDataset(reader, signals, pool_segments=POOL_SEGMENTS)
        order = BatchOrder(
            dataset.segment,
            dataset.length,
            batch_size=BATCH_SIZE,
            pool_segments=POOL_SEGMENTS,
            seed=0,
        )
        dataset.follow(order.timetable())
        batches = list(order)
        for members in batches:
            dataset.__getitems__(members)
    return watch, batches


class MemoryMaps:
    """The same stored values, uncompressed and unchecked, gathered from one file an array."""

    def __init__(self, reader: StoreReader, signals: Sequence[str], directory: Path) -> None:
        self._maps: list[NDArray[Any]] = []
        dataset = StoreDataset(reader, signals)
        capacity = reader.plan["segment_tokens"]
        start = reader.examples["start"][dataset.examples]
        # Training segments come first on the token axis.
        numbers = reader.segments(TRAIN)
        self._rows = [
            np.arange(first, first + length)
            for first, length in zip(start.tolist(), dataset.length.tolist(), strict=True)
        ]
        segments = {number: reader.read_segment(number, signals) for number in numbers}
        for name in signals:
            declared = reader.signal(name).declaration
            assert declared.axis == Axis.TOKEN
            for part_name, part in declared.arrays().items():
                path = directory / f"{len(self._maps)}.bin"
                shape = ((max(numbers) + 1) * capacity, *part.row_shape)
                written = np.memmap(path, dtype=part.dtype, mode="w+", shape=shape)
                for number, segment in segments.items():
                    place = slice(number * capacity, (number + 1) * capacity)
                    written[place] = segment.features[name][part_name]
                written.flush()
                self._maps.append(np.memmap(path, dtype=part.dtype, mode="r", shape=shape))

    def read(self, batches: Sequence[Sequence[int]]) -> Stopwatch:
        """Time the same batches."""
        with stopwatch() as watch:
            for members in batches:
                rows = np.concatenate([self._rows[member] for member in members])
                for values in self._maps:
                    torch.from_numpy(values[rows])
        return watch


def measure(root: Path, *, tokens: int, layers: int, width: int) -> dict[str, Any]:
    """Run everything below `root`; return the numbers as JSON values."""
    write_corpus(root / "tokens", train_tokens=tokens)
    write_teacher(root / "teacher", layers=layers, width=width)
    signals = default_signals(layers)
    options = SegmentOptions(segment_tokens=8192)
    _, half_tokens, half = timed_capture(root, signals, replace(options, fraction=0.5))
    store, all_tokens, captured = timed_capture(root, signals, options)
    with stopwatch() as recognised:
        assert is_complete(Layout(store), signals, [])
    alone = teacher_alone(store, root / "teacher", options)
    names = [signal.name for signal in signals]
    reader = StoreReader(store)
    first, batches = read_epoch(reader, names)
    # The second epoch's files are checked already: the first use in a process pays for that.
    second, _ = read_epoch(reader, names)
    mapped = MemoryMaps(reader, names, root).read(batches)
    examples = reader.examples
    train = reader.segments(TRAIN)
    train_tokens = int(examples["length"][np.isin(examples["segment"], train)].sum())
    stored = {name: reader.signal(name) for name in names}
    return {
        "tokens": all_tokens,
        "train_tokens": train_tokens,
        "segments": len(reader.plan["segments"]),
        "train_segments": len(train),
        "signals": len(names),
        "bytes": sum(signal.bytes for signal in stored.values()),
        "bytes_per_token": sum(signal.bytes / signal.tokens for signal in stored.values()),
        "recognised_seconds": recognised.seconds,
        **{
            f"{name}_{field}": value
            for name, watch in {
                "teacher": alone,
                "capture": captured,
                "first_epoch": first,
                "epoch": second,
                "memory_map": mapped,
            }.items()
            for field, value in vars(watch).items()
        },
        "capture_over_teacher": captured.cpu_seconds / alone.cpu_seconds,
        # Without what a capture does once: the check of the taps, statistics, the plan.
        "further_token_over_teacher": (captured.cpu_seconds - half.cpu_seconds)
        / (all_tokens - half_tokens)
        / (alone.cpu_seconds / all_tokens),
        "epoch_tokens_per_second": train_tokens / second.seconds,
        "epoch_segments_per_second": len(train) / second.seconds,
        "memory_map_tokens_per_second": train_tokens / mapped.seconds,
    }


def table(found: dict[str, Any]) -> Table:
    """Lay the numbers out for people."""
    shown = Table(box=None, header_style="bold")
    for heading in ("", "seconds", "CPU seconds", "tokens/s", "segments/s", "CPU ratio"):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for label, name, tokens, segments, base in (
        ("teacher alone", "teacher", "tokens", "segments", "teacher"),
        ("teacher and capture", "capture", "tokens", "segments", "teacher"),
        ("memory map, an epoch", "memory_map", "train_tokens", "train_segments", "memory_map"),
        ("store, first epoch", "first_epoch", "train_tokens", "train_segments", "memory_map"),
        ("store, an epoch", "epoch", "train_tokens", "train_segments", "memory_map"),
    ):
        seconds, cpu = found[f"{name}_seconds"], found[f"{name}_cpu_seconds"]
        shown.add_row(
            label,
            f"{seconds:.2f}",
            f"{cpu:.2f}",
            f"{found[tokens] / seconds:,.0f}",
            f"{found[segments] / seconds:.1f}",
            f"{cpu / found[f'{base}_cpu_seconds']:.2f}",
        )
    return shown


@click.command()
@click.option("--tokens", default=40_000, show_default=True, help="Training tokens.")
@click.option("--layers", default=6, show_default=True, help="Blocks of the teacher.")
@click.option("--width", default=256, show_default=True, help="Width of the teacher.")
def main(tokens: int, layers: int, width: int) -> None:
    """Measure capture and reading on random data."""
    logging.basicConfig(level="WARNING")
    quiet()
    with tempfile.TemporaryDirectory() as directory:
        found = measure(Path(directory), tokens=tokens, layers=layers, width=width)
    console = Console()
    console.print(
        f"{found['signals']} signals of a teacher of {layers} x {width}, "
        f"{found['tokens']:,} tokens, "
        f"{found['bytes'] / 1e6:.1f} MB, {found['bytes_per_token']:,.0f} bytes a token; recognised "
        f"as whole in {found['recognised_seconds']:.2f} s"
    )
    console.print(table(found))
    console.print(
        f"a further captured token costs {found['further_token_over_teacher']:.2f} times the "
        "teacher's CPU time; the rest of capture is done once"
    )
    size = {"tokens_wanted": tokens, "layers": layers, "width": width}
    click.echo(json.dumps({"benchmark": "store", **size, **found, "machine": machine()}))


if __name__ == "__main__":
    main()
