"""What capturing costs beside the teacher's bare forward pass, and beside what one writes by hand.

Run `python -m benchmarks.capture`: tables for people, and one JSON line last. Random data; seconds
hold for one machine, the ratios travel better. Two forward passes stand as the limit: all below the
head, for the form `head` needs no logits, and the whole model, for `topk`.
"""

import json
import logging
import statistics
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.capture_arms import TOP, Setting
from benchmarks.codecs import codec_rows
from benchmarks.results import results_option, write
from benchmarks.synthetic import machine, quiet, write_corpus, write_teacher
from benchmarks.turns import Laps, Process, interleaved, over, spread
from pipeline.runtime import Runtime
from pipeline.store.codec import encode_shard
from pipeline.store.forms.registry import build_form
from pipeline.store.reader import StoreReader
from pipeline.teacher.capture.capture import capture

ARMS = {
    "base": "forward, no logits",
    "full": "forward, logits",
    "ours_head": "ours, head",
    "ours_topk": f"ours, topk {TOP}",
    "eager": "eager maps, torch.save a batch",
    "safetensors": "hidden states, safetensors a sample",
    "dask": "hidden states, dask.array.to_zarr",
}
LIMIT = {"ours_head": "base"}
"""The forward pass that an arm is held against; `full` where none is named."""
HEADS = 12
LENGTH = 256
LARGE_VOCAB = 131_072


def lay_out(
    root: Path, setting: Setting, *, tokens: int, layers: int, width: int, vocab: int
) -> int:
    """Write corpus, teacher and a first store, whose batches all arms run; return its tokens."""
    lengths = {"shortest": LENGTH, "longest": LENGTH}
    write_corpus(root / "tokens", train_tokens=tokens, vocab=vocab, **lengths)
    sizes = {"layers": layers, "width": width, "vocab": vocab, "heads": HEADS}
    write_teacher(root / "teacher", longest=LENGTH, **sizes)
    store = capture(
        tokens=root / "tokens",
        teacher=root / "teacher",
        stores=root / "plan",
        signals=[*setting.signals("head"), *setting.signals("topk")[-1:]],
        blocks=[],
        options=setting.options,
        nonfinite="stop",
        runtime=Runtime(device="cpu"),
    )
    return int(StoreReader(store).examples["length"].sum())


def stored_bytes(root: Path, *, width: int, vocab: int) -> dict[str, float]:
    """Return the bytes of a plan's store over those of the same selection in dense float16."""
    (store,) = (path for path in (root / "plan").iterdir() if path.is_dir())
    reader = StoreReader(store)
    dense = {
        "hidden": 2 * width,
        # Of every head a row over its example's tokens.
        "attention": 2 * HEADS * LENGTH,
        "logits": 2 * vocab,
    }
    found: dict[str, list[float]] = {}
    for name in reader.signals:
        signal = reader.signal(name)
        form = signal.declaration.form.name
        key = f"logits_{form}" if signal.declaration.kind == "logits" else signal.declaration.kind
        share = signal.bytes / signal.tokens / dense[signal.declaration.kind]
        found.setdefault(f"{key}_bytes_over_fp16", []).append(share)
    return {key: statistics.mean(shares) for key, shares in found.items()}


def large_vocabulary_share(rows: int = 256) -> float:
    """Return the bytes of `topk` over dense float16 logits of a vocabulary of 131,072 entries."""
    generator = np.random.default_rng(0)
    logits = generator.standard_normal((rows, LARGE_VOCAB), np.float32) * 3
    encoded = build_form("logits", "topk", {"k": TOP}).encode({"logits": logits}, None)
    stored = sum(len(encode_shard(part, rows)) for part in encoded.values())
    return stored / (2 * LARGE_VOCAB * rows)


def ratios(laps: Laps, key: str) -> dict[str, dict[str, float]]:
    """Return each arm over its forward pass, turn by turn."""
    return {name: over(laps, name, LIMIT.get(name, "full"), key) for name in laps}


def table(laps: Laps, tokens: int) -> Table:
    """Lay the arms out for people."""
    shown = Table(box=None, header_style="bold")
    for heading in ("", "us/token", "CPU us", "wall ratio", "CPU ratio", "B/token", "peak MB"):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    wall, cpu = ratios(laps, "seconds"), ratios(laps, "cpu_seconds")
    for name, label in ARMS.items():
        own = laps[name]
        shown.add_row(
            label,
            *(
                f"{1e6 * statistics.median(lap[key] for lap in own) / tokens:,.0f}"
                for key in ("seconds", "cpu_seconds")
            ),
            *("{median:.3f} ({least:.2f}-{most:.2f})".format(**of[name]) for of in (wall, cpu)),
            f"{own[0]['bytes'] / tokens:,.0f}",
            f"{max(lap['peak_bytes'] - lap['loaded_bytes'] for lap in own) / 1e6:,.0f}",
        )
    return shown


def figures(laps: Laps, tokens: int) -> dict[str, Any]:
    """Return the numbers: ratios of the per-token part, and what a capture costs once."""
    wall, cpu = ratios(laps, "seconds"), ratios(laps, "cpu_seconds")
    ours = ("ours_head", "ours_topk")
    peaks = {
        name: max(lap["peak_bytes"] - lap["loaded_bytes"] for lap in own)
        for name, own in laps.items()
    }
    return {
        "capture_wall_over_forward": max(wall[name]["median"] for name in ours),
        "capture_cpu_over_forward": max(cpu[name]["median"] for name in ours),
        **{
            f"{name}_{key}": value
            for name in laps
            for key, value in {
                "wall_over_forward": wall[name],
                "cpu_over_forward": cpu[name],
                "bytes_a_token": laps[name][0]["bytes"] / tokens,
                "peak_bytes": peaks[name],
                "seconds": spread([lap["seconds"] for lap in laps[name]]),
                "cpu_seconds": spread([lap["cpu_seconds"] for lap in laps[name]]),
            }.items()
        },
        **{
            f"{name}_once_{key}": statistics.median(lap[f"once_{key}"] for lap in laps[name])
            for name in ours
            for key in ("seconds", "cpu_seconds")
        },
    }


@click.command()
@click.option("--tokens", default=32_768, show_default=True, help="Training tokens.")
@click.option("--layers", default=6, show_default=True, help="Blocks of the teacher.")
@click.option("--width", default=384, show_default=True, help="Width of the teacher.")
@click.option("--vocab", default=32_000, show_default=True, help="Entries of its vocabulary.")
@click.option("--laps", default=5, show_default=True, help="Counted runs of each arm.")
@click.option("--quick", is_flag=True, help="Within four minutes on two cores: 8,192 tokens.")
@results_option
def main(
    tokens: int,
    layers: int,
    width: int,
    vocab: int,
    laps: int,
    quick: bool,
    results: Path | None,
) -> None:
    """Measure what capturing costs on random data."""
    logging.basicConfig(level="WARNING")
    quiet()
    tokens = 8192 if quick else tokens
    kept = tuple(sorted({layers // 3, 2 * layers // 3, layers} - {0}))
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        setting = Setting(directory, kept, 4096 if not quick else 2048, 4096 if not quick else 2048)
        ran = lay_out(root, setting, tokens=tokens, layers=layers, width=width, vocab=vocab)
        processes = {
            name: Process("benchmarks.capture_arms", name, asdict(setting)) for name in ARMS
        }
        for process in processes.values():
            process.read()
        laps_found = interleaved(processes, laps)
        for process in processes.values():
            process.end()
        found = figures(laps_found, ran) | stored_bytes(root, width=width, vocab=vocab)
    codecs = codec_rows(quick=quick)
    found |= {
        "logits_bytes_over_fp16": large_vocabulary_share(),
        "tokens": ran,
        "teacher": f"{layers} x {width}, vocabulary {vocab}, {LENGTH} tokens a row",
        "codecs": codecs,
    }
    console = Console(width=120)
    console.print(
        f"hidden states and attention of layers {', '.join(map(str, kept))} and logits of a "
        f"teacher of {found['teacher']}; {ran:,} tokens, {laps} laps: median (least-most)"
    )
    console.print(table(laps_found, ran))
    console.print(
        f"once a capture: {found['ours_head_once_seconds']:.2f} s (head), "
        f"{found['ours_topk_once_seconds']:.2f} s (topk): checks, statistics, plan, index"
    )
    shown = Table(box=None, header_style="bold")
    for heading in ("one shard of int8 levels", "ms", "CPU ms", "bytes a value"):
        shown.add_column(heading, justify="left" if heading[0] == "o" else "right")
    for row in codecs:
        shown.add_row(
            row["name"], *(f"{row[k]:.1f}" for k in ("ms", "cpu_ms")), f"{row['bytes']:.3f}"
        )
    console.print(shown)
    if results is not None:
        write("capture", found, results)
    click.echo(json.dumps({"figures": found, "machine": machine()}))


if __name__ == "__main__":
    main()
