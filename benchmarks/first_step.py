"""How soon a student takes its first step from a store of many segments, and in how much memory.

Run `python -m benchmarks.first_step`: a table for people, and one JSON line last. The store is
written directly, without a teacher; a process of its own opens it and trains, as `decant train`
does, and then reads a whole epoch. A second store of a tenth of the segments shows what grows with
their number.
"""

import json
import logging
import os
import resource
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from safetensors.numpy import save
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.results import results_option, write
from benchmarks.synthetic import machine, quiet
from pipeline.axes import TEST, TRAIN, VALIDATION
from pipeline.provenance import write_bytes_atomically, write_json
from pipeline.store.commit import SignalWriter
from pipeline.store.forms.form import Channels, Geometry
from pipeline.store.forms.int8 import Int8
from pipeline.store.index import read_index
from pipeline.store.layout import Layout
from pipeline.store.plan import Plan, make_plan
from pipeline.store.planner import Rows, rows_digest, write_plan
from pipeline.store.reader import StoreReader
from pipeline.store.records import Declaration
from pipeline.store.shards import file_digest
from pipeline.store.signals import Signal
from pipeline.student.align.distiller import Distiller
from pipeline.student.align.objective import Objective
from pipeline.student.data.batch_order import BatchOrder
from pipeline.student.data.features import TeacherFeatures
from pipeline.student.data.feed import Feed
from pipeline.student.data.stream import StoreDataset
from pipeline.student.loop.steps import StudentLoop
from pipeline.training.arguments import training_arguments
from pipeline.training.options import TrainOptions

SEGMENT_TOKENS = 512
CHUNK_TOKENS = 256
SHORTEST, LONGEST = 16, 128
VOCAB = 512
WIDTH = 128
LAYERS = (1, 2)
POOL_SEGMENTS = 4
BATCH_SIZE = 32
STEPS = 5


def write_store(path: Path, segments: int) -> None:
    """Write a store of two layers' hidden states, every segment with the same values."""
    layout = Layout(path)
    generator = np.random.default_rng(0)
    # By the mean length; the planner then needs a little more or less than `segments`.
    count = (segments - 2) * SEGMENT_TOKENS * 2 // (SHORTEST + LONGEST)
    lengths = {TRAIN: generator.integers(SHORTEST, LONGEST + 1, count)}
    lengths |= {VALIDATION: np.array([LONGEST]), TEST: np.array([LONGEST])}
    plan = make_plan(lengths, segment_tokens=SEGMENT_TOKENS, seed=0)
    ids = generator.integers(1, VOCAB, int(plan.length.sum()), np.int32)
    starts = np.cumsum(plan.length)[:-1]
    ones = np.ones(LONGEST, np.uint8)
    tokens = {
        "input_ids": np.split(ids, starts),
        "loss_mask": [ones[:length] for length in plan.length.tolist()],
    }
    zeros = np.zeros(len(plan.row), np.int64)
    rows = Rows(tokens, zeros - 1, plan.row.copy(), zeros)
    write_json(layout.assets / "teacher" / "config.json", {"model_type": "llama"})
    description = {
        "spec": {},
        "chunk_tokens": CHUNK_TOKENS,
        "task": "causal-lm",
        "classes": [],
        "vocab": VOCAB,
        "pad_id": 0,
        "max_length": LONGEST,
    }
    write_plan(layout, plan, rows, description)
    identities = [rows_digest(rows.digests[plan.in_segment(n)]) for n in range(plan.segments)]
    for layer in LAYERS:
        _write_signal(layout, plan, Signal(Int8(), layer), identities)


def _write_signal(layout: Layout, plan: Plan, signal: Signal, identities: list[str]) -> None:
    channels = Channels(np.zeros(WIDTH, np.float32), np.ones(WIDTH, np.float32))
    path = layout.channels(signal.kind, signal.layer)
    data = save({"mean": channels.mean, "deviation": channels.deviation})
    write_bytes_atomically(path, data)
    declared = Declaration.of(
        signal,
        Geometry(width=WIDTH),
        (TRAIN, VALIDATION, TEST),
        {},
        file_digest(path, layout.root),
    )
    writer = SignalWriter(layout, plan, CHUNK_TOKENS, declared)
    values = np.random.default_rng(1).standard_normal((writer.shard_rows, WIDTH), np.float32)
    buffers: Any = Int8().encode({"hidden": values}, channels)
    writer.declare()
    for number in writer.segments:
        writer.write_segment(number, buffers, rows=identities[number])
    writer.commit()


def first_step(path: Path, import_seconds: float) -> None:
    """Train a few steps from a store, read an epoch; print the figures as one JSON line.

    For a process of its own.
    """
    logging.basicConfig(level="WARNING")
    quiet()
    begun = perf_counter()
    index = read_index(Layout(path))["signals"]
    reader = StoreReader(path, {name: entry["digest"] for name, entry in index.items()})
    opened = perf_counter()
    student = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=len(LAYERS),
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=LONGEST,
        )
    )
    objective = Objective.model_validate({"feature": {"weight": 1.0}, "labels": {"weight": 1.0}})
    features = TeacherFeatures(reader, list(reader.pins))
    maps = {"feature": {layer: layer for layer in LAYERS}}
    distiller = Distiller(student, features, objective, maps, task="causal-lm")
    dataset = StoreDataset(reader, list(reader.pins), pool_segments=POOL_SEGMENTS)
    order = BatchOrder(
        dataset.segment,
        dataset.length,
        batch_size=BATCH_SIZE,
        pool_segments=POOL_SEGMENTS,
        seed=0,
    )
    options = TrainOptions(steps=STEPS + 1, batch_size=BATCH_SIZE)
    with tempfile.TemporaryDirectory() as work:
        arguments = training_arguments(options, Path(work), "cpu")
        loop = StudentLoop(distiller, dataset, order, arguments, description="first step")
        between = [perf_counter() for _ in loop.steps()]
    steps = [ended - begun for begun, ended in pairwise(between)]
    step = sorted(steps)[len(steps) // 2]
    read_seconds, growth = _read_epoch(dataset, order)
    segment = reader.read_segment(0, list(reader.pins))
    arrays = [*segment.tokens.values(), *(a for f in segment.features.values() for a in f.values())]
    found = {
        "segments": len(reader.plan["segments"]),
        "import_seconds": import_seconds,
        "open_seconds": opened - begun,
        "first_step_seconds": between[1] - begun - step,
        "step_seconds": step,
        "epoch_read_seconds": read_seconds,
        "epoch_growth_bytes": growth,
        "segment_bytes": sum(array.nbytes for array in arrays),
    }
    print(json.dumps(found))


def _read_epoch(dataset: StoreDataset, order: BatchOrder) -> tuple[float, int]:
    """Feed an epoch to nobody; return its seconds, and how much more memory it had in use."""
    begun, before, most = perf_counter(), _bytes_in_use(), 0
    order.set_epoch(1)
    dataset.follow(order.timetable())
    feed, batches = Feed(dataset, torch.device("cpu"), lambda _: {"tokens": 1}), iter(order)
    while feed.take(batches, 1):
        most = max(most, _bytes_in_use())
    feed.close()
    return perf_counter() - begun, most - before


def _bytes_in_use() -> int:
    """Return the memory of this process that lies in RAM, as Linux tells it."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(root: Path, *, segments: int = 10_000) -> dict[str, float]:
    """Measure with a store of about so many segments below `root`, written if it is not there.

    Returns:
        Seconds of the imports, from then to the end of the first step without the step itself
        (`first_step_seconds`), of these for opening the store; of reading an epoch, and by how many
        bytes it raised the process's peak, beside the bytes of one segment.
    """
    path = root / f"segments-{segments}"
    if not Layout(path).index.exists() or len(StoreReader(path).signals) < len(LAYERS):
        # Nothing is measured of writing, and no power is cut.
        with patch.object(os, "fsync", lambda _: None):
            write_store(path, segments)
    code = (
        "from time import perf_counter; begun = perf_counter()\n"
        "import sys; from pathlib import Path; from benchmarks.first_step import first_step\n"
        "first_step(Path(sys.argv[1]), perf_counter() - begun)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


@click.command()
@click.option("--segments", default=10_000, show_default=True, help="Segments of the store.")
@click.option("--root", type=click.Path(path_type=Path), help="Keep the stores here.")
@results_option
def main(segments: int, root: Path | None, results: Path | None) -> None:
    """Measure the first step from a large store, and from one of a tenth of it."""
    with tempfile.TemporaryDirectory() as directory:
        place = root or Path(directory)
        large, small = (measure(place, segments=n) for n in (segments, segments // 10))
    table = Table(box=None)
    for heading in ("", *(f"{found['segments']:,} segments" for found in (small, large))):
        table.add_column(heading, justify="right" if heading else "left")
    for key in large:
        digits = 0 if key.endswith("bytes") or key == "segments" else 2
        table.add_row(key, *(f"{found[key]:,.{digits}f}" for found in (small, large)))
    Console().print(table)
    figures = {"large": large, "small": small}
    if results is not None:
        write("first_step", figures, results)
    click.echo(json.dumps({"benchmark": "first_step", **figures, "machine": machine()}))


if __name__ == "__main__":
    main()
