"""What durability costs: writing a signal with every fsync and with none, in turns.

Run `python -m benchmarks.fsync`: a table for people, and one JSON line last. Only the store works
here: a capture waits for its teacher beside, so of its time fsync takes a smaller part. Give
`--directory` a place on the disk that matters; on a file system in memory fsync costs nothing.
"""

import json
import os
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from benchmarks.synthetic import VOCAB, machine
from pipeline.axes import TEST, TRAIN, VALIDATION
from pipeline.provenance import write_json
from pipeline.store.commit import SignalWriter
from pipeline.store.forms.form import Channels, Geometry
from pipeline.store.forms.int8 import Int8
from pipeline.store.layout import Layout
from pipeline.store.plan import Plan, make_plan
from pipeline.store.planner import Rows, rows_digest, write_plan
from pipeline.store.reader import StoreReader
from pipeline.store.records import Declaration
from pipeline.store.signals import Signal

CHUNK_TOKENS = 256
ROW_TOKENS = 256


@dataclass
class Syncs:
    """Calls of fsync, and the seconds they took."""

    calls: int = 0
    seconds: float = 0.0


@contextmanager
def counted(*, synced: bool) -> Iterator[Syncs]:
    """Count the block's calls of `os.fsync`; leave them out if not `synced`."""
    found, fsync = Syncs(), os.fsync

    def counting(descriptor: int) -> None:
        begun = perf_counter()
        if synced:
            fsync(descriptor)
        found.calls += 1
        found.seconds += perf_counter() - begun

    os.fsync = counting
    try:
        yield found
    finally:
        os.fsync = fsync


def prepare(root: Path, *, segments: int, segment_tokens: int) -> tuple[Layout, Plan]:
    """Write the plan of a store of full segments."""
    rows = segment_tokens // ROW_TOKENS
    lengths = {
        TRAIN: np.full(rows * (segments - 2), ROW_TOKENS),
        VALIDATION: np.full(rows, ROW_TOKENS),
        TEST: np.full(rows, ROW_TOKENS),
    }
    plan, layout = make_plan(lengths, segment_tokens=segment_tokens, seed=0), Layout(root)
    count = len(plan.row)
    ids = np.random.default_rng(0).integers(0, VOCAB, (count, ROW_TOKENS), np.int32)
    ones = np.ones(ROW_TOKENS, np.uint8)
    tokens = {"input_ids": list(ids), "loss_mask": [ones] * count}
    zeros = np.zeros(count, np.int64)
    write_json(layout.assets / "teacher" / "config.json", {})
    description = {
        "spec": {},
        "chunk_tokens": CHUNK_TOKENS,
        "task": "causal-lm",
        "classes": [],
        "vocab": VOCAB,
        "pad_id": 0,
        "max_length": ROW_TOKENS,
    }
    write_plan(layout, plan, Rows(tokens, zeros - 1, plan.row.copy(), zeros), description)
    return layout, plan


def encoded(writer: SignalWriter, width: int) -> dict[str, NDArray[Any]]:
    """Return one segment's arrays, of normal values."""
    values = np.random.default_rng(1).standard_normal((writer.shard_rows, width), np.float32)
    channels = Channels(np.zeros(width, np.float32), np.ones(width, np.float32))
    return Int8().encode({"hidden": values}, channels)


def write_store(
    root: Path, *, synced: bool, segments: int, segment_tokens: int, width: int
) -> tuple[float, Syncs, int]:
    """Write one signal, from its declaration to the index; return seconds, fsyncs and bytes."""
    layout, plan = prepare(root, segments=segments, segment_tokens=segment_tokens)
    signal = Signal(Int8(), 1)
    declared = Declaration.of(signal, Geometry(width=width), (TRAIN, VALIDATION, TEST), {}, None)
    writer = SignalWriter(layout, plan, CHUNK_TOKENS, declared)
    buffers = encoded(writer, width)
    reader = StoreReader(root)
    digests = reader.examples["digest"]
    rows = [rows_digest(digests[reader.examples_in(number)]) for number in writer.segments]
    # What setting up left to the disk is not this writer's cost.
    os.sync()
    with counted(synced=synced) as syncs:
        begun = perf_counter()
        writer.declare()
        for segment in writer.segments:
            writer.write_segment(segment, buffers, rows=rows[segment])
        writer.commit()
        seconds = perf_counter() - begun
    return seconds, syncs, StoreReader(root).signal(signal.name).bytes


def file_system(path: Path) -> str:
    """Return the kind of file system that `path` lies on, or an empty string."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return ""
    lines = [line.split() for line in mounts.read_text().splitlines()]
    inside = [(len(line[1]), line[2]) for line in lines if path.resolve().is_relative_to(line[1])]
    return max(inside)[1]


def measure(
    root: Path, *, segments: int, segment_tokens: int, width: int, repetitions: int
) -> dict[str, Any]:
    """Write with and without fsync in turns; return the numbers as JSON values."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    within: list[float] = []
    syncs, size = Syncs(), 0
    for number in range(-1, repetitions):
        for synced in (True, False) if number % 2 else (False, True):
            directory = root / "store"
            taken, found, size = write_store(
                directory,
                synced=synced,
                segments=segments,
                segment_tokens=segment_tokens,
                width=width,
            )
            shutil.rmtree(directory)
            if number < 0:
                continue  # the first of each pays for imports and caches
            seconds[synced].append(taken)
            if synced:
                syncs = found
                within.append(found.seconds)
    ratios = [one / other for one, other in zip(seconds[True], seconds[False], strict=True)]
    return {
        "segments": segments,
        "segment_tokens": segment_tokens,
        "width": width,
        "repetitions": repetitions,
        "bytes": size,
        "file_system": file_system(root),
        "fsyncs": syncs.calls,
        "fsyncs_a_segment": syncs.calls / segments,
        "synced_seconds": statistics.median(seconds[True]),
        "unsynced_seconds": statistics.median(seconds[False]),
        "within_fsync_seconds": statistics.median(within),
        "ratio": statistics.median(ratios),
        "ratio_lowest": min(ratios),
        "ratio_highest": max(ratios),
    }


def table(found: dict[str, Any]) -> Table:
    """Lay the numbers out for people."""
    shown = Table(box=None, header_style="bold")
    for heading in ("", "seconds", "MB/s"):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for label, key in (("every fsync", "synced_seconds"), ("none", "unsynced_seconds")):
        shown.add_row(label, f"{found[key]:.2f}", f"{found['bytes'] / found[key] / 1e6:.0f}")
    return shown


@click.command()
@click.option("--segments", default=24, show_default=True, help="Segments of the store.")
@click.option("--segment-tokens", default=16_384, show_default=True, help="Tokens of each.")
@click.option("--width", default=256, show_default=True, help="Channels of the hidden state.")
@click.option("--repetitions", default=7, show_default=True, help="Pairs of runs.")
@click.option("--quick", is_flag=True, help="A small store, to see that it works.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, exists=True, path_type=Path),
    help="Where to write; by default the directory for temporary files.",
)
def main(
    segments: int,
    segment_tokens: int,
    width: int,
    repetitions: int,
    quick: bool,
    directory: Path | None,
) -> None:
    """Measure what fsync costs the store."""
    if quick:
        segments, segment_tokens, width, repetitions = 4, 2048, 64, 2
    with tempfile.TemporaryDirectory(dir=directory) as place:
        found = measure(
            Path(place),
            segments=segments,
            segment_tokens=segment_tokens,
            width=width,
            repetitions=repetitions,
        )
    console = Console()
    console.print(
        f"{segments} segments of {segment_tokens:,} tokens, int8 of {width} channels, "
        f"{found['bytes'] / 1e6:.1f} MB on {found['file_system'] or 'an unknown file system'}"
    )
    console.print(table(found))
    console.print(
        f"{found['ratio']:.2f} times as long with fsync ({found['ratio_lowest']:.2f} to "
        f"{found['ratio_highest']:.2f} in {repetitions} pairs); {found['fsyncs_a_segment']:.1f} "
        f"calls a segment take {found['within_fsync_seconds']:.2f} s in all"
    )
    click.echo(json.dumps({"benchmark": "fsync", **found, "machine": machine()}))


if __name__ == "__main__":
    main()
