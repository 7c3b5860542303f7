"""What a training step costs fed from the store, from memory, by hand, and beside a live teacher.

Run `python -m benchmarks.train`: a table for people, and one JSON line last. Random data; seconds
hold for one machine, the ratios travel better. Every arm takes the same steps on the same batches,
which is checked before any is timed. A lap is an epoch. The store's reads the next one's first
segments at its end, as in training, and ends when they are there: every segment is read once a lap,
and no other arm pays for it. A cold one begins by opening the store and reads nothing for a next.

The best that a live teacher's absence can give is (teacher + step) / step, the step as from memory:
`live_speedup_over_possible` says how much of it the store gives.
"""

import json
import logging
import statistics
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from benchmarks import losses
from benchmarks.results import results_option, write
from benchmarks.rivals import HAS_LITDATA, RIVALS, plain_samples
from benchmarks.synthetic import machine, quiet, write_corpus, write_teacher
from benchmarks.train_arms import Arm, Plan, Setting
from benchmarks.turns import Laps, interleaved, over, spread
from pipeline.runtime import Runtime
from pipeline.store.forms.registry import build_form
from pipeline.store.reader import StoreReader
from pipeline.store.signals import Signal
from pipeline.teacher.capture.capture import capture
from pipeline.teacher.capture.spec import SegmentOptions

ARMS = {
    "ram": "all batches in memory",
    "store": "ours, from the store",
    "memmap": "np.memmap",
    "safetensors": "safetensors a sample, DataLoader",
    "litdata": "LitData",
    "zarr_dask": "dask.array.from_zarr",
    "live": "a live teacher in the step",
    "teacher": "the teacher alone, no step",
    "reading": "reading alone, no step",
}
FROM_DISK = ("store", *RIVALS)
HEADS = 12
SHORTEST = 32
FLOAT16 = 1e-3
"""Relative L2 error of features by float16; all but those below keep the store's values in it."""
ERRORS = {"store": 0.0, "ram": 0.0, "reading": 0.0, "live": 2e-2, "teacher": 2e-2}
"""The same for what holds the store's own bytes, and for what never was int8."""


def lay_out(
    root: Path,
    setting: Setting,
    *,
    tokens: int,
    length: int,
    segment_tokens: int,
    teacher: Mapping[str, int],
) -> tuple[int, dict[str, float]]:
    """Write corpus, teacher, store, and what the rivals read.

    Returns:
        The tokens of an epoch, and by name the bytes a token on disk.
    """
    write_corpus(
        root / "tokens",
        train_tokens=tokens,
        vocab=teacher["vocab"],
        shortest=min(SHORTEST, length),
        longest=length,
    )
    write_teacher(root / "teacher", heads=HEADS, longest=length, **teacher)
    layers = sorted(set(setting.maps.values()))
    int8, qk = build_form("hidden", "int8", {}), build_form("attention", "qk", {})
    capture(
        tokens=root / "tokens",
        teacher=root / "teacher",
        stores=root / "stores",
        signals=[
            *(Signal(int8, layer) for layer in layers),
            *(Signal(qk, layer) for layer in layers if layer),
            Signal(build_form("logits", "head", {}), None),
        ],
        blocks=[],
        options=SegmentOptions(segment_tokens=segment_tokens),
        nonfinite="stop",
        runtime=Runtime(device=setting.device),
    )
    reader = StoreReader(setting.store)
    plan = Plan(reader, setting)
    stored = [reader.signal(name) for name in reader.signals]
    sizes = {"store": sum(signal.bytes / signal.tokens for signal in stored)}
    samples = plain_samples(reader, plan.dataset)
    for name in present(RIVALS):
        directory = root / name
        directory.mkdir()
        RIVALS[name].write(directory, samples, plan.batches)
        written = sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
        # LitData holds the batches alone, without the few rows that fill none.
        held = plan.tokens if name == "litdata" else int(plan.dataset.length.sum())
        sizes[name] = written / held
    return plan.tokens, sizes


def present(names: Mapping[str, Any]) -> list[str]:
    """Return the arms that can run here: LitData only where it is installed."""
    return [name for name in names if name != "litdata" or HAS_LITDATA]


def check(arms: Mapping[str, Arm], root: Path) -> dict[str, float]:
    """Refuse to time arms that do not train on the same; return each one's error in the features.

    Raises:
        click.ClickException: If an arm has other batches, features or losses than the store.
    """
    wanted = arms["store"].ask("check")
    features = load_file(root / "check-store.safetensors")
    errors = {}
    for name, arm in arms.items():
        found = arm.ask(" ".join(["check", *wanted["terms"]]))
        if sorted(found["rows"]) != sorted(wanted["rows"]):
            raise click.ClickException(f"{name}: other batches than the store's")
        own = load_file(root / f"check-{name}.safetensors")
        error = max(
            float((own[key] - value).norm() / value.norm()) for key, value in features.items()
        )
        loss_error = max(
            abs(found["terms"][rows][term] - value) / value
            for rows, terms in wanted["terms"].items()
            for term, value in terms.items()
        )
        bound = ERRORS.get(name, FLOAT16)
        if not (error <= bound and loss_error <= 1e-5 + bound):
            raise click.ClickException(
                f"{name}: features differ from the store's by {error:.2g}, a term of the loss by "
                f"{loss_error:.2g}; expected at most {bound:.2g}"
            )
        errors[name] = error
    return errors


def speedups(laps: Laps) -> dict[str, Any]:
    """Return how much faster the store is than a live teacher, and how much it could be."""
    seconds = {name: [lap["seconds"] for lap in own] for name, own in laps.items()}
    found = [live / store for live, store in zip(seconds["live"], seconds["store"], strict=True)]
    possible = [
        (teacher + step) / step
        for teacher, step in zip(seconds["teacher"], seconds["ram"], strict=True)
    ]
    shares = [a / b for a, b in zip(found, possible, strict=True)]
    return {
        "live_speedup_over_possible": statistics.median(shares),
        "live_speedup_over_possible_spread": spread(shares),
        "live_speedup": spread(found),
        "live_speedup_possible": spread(possible),
    }


def figures(warm: Laps, cold: Laps, steps: int, sizes: Mapping[str, float]) -> dict[str, Any]:
    """Return the numbers: the store beside the others first, then each arm's own.

    Args:
        warm: Laps with the page cache as it is.
        cold: Laps after files were dropped from it; of those arms that have files, and `ram`.
        steps: Steps of a lap.
        sizes: Bytes a token on disk.
    """
    found: dict[str, Any] = {
        f"{prefix}step_over_{base}": over(laps, "store", base, "seconds")["median"]
        for prefix, laps in (("", warm), ("cold_", cold))
        for base in ("ram", "memmap")
    }
    # What a step must hide: the store's reading, decoding and batching, with nothing beside them.
    found["reading_over_ram"] = over(warm, "reading", "ram", "seconds")["median"]
    found |= speedups(warm)
    for prefix, laps in (("", warm), ("cold_", cold)):
        for name, own in laps.items():
            for key in ("seconds", "cpu_seconds"):
                a_step = [lap[key] / steps for lap in own]
                found[f"{prefix}{name}_step_{key}"] = spread(a_step)
                found[f"{prefix}{name}_{key}_over_ram"] = over(laps, name, "ram", key)
    # Of pages that should have left the cache, those that had not; 0 where the kernel did it.
    found["cold_resident_share"] = {
        name: max(lap["resident_share"] for lap in own)
        for name, own in cold.items()
        if name in sizes
    }
    return found | {f"{name}_bytes_a_token": size for name, size in sizes.items()}


def table(found: Mapping[str, Any], names: list[str]) -> Table:
    """Lay the arms out for people."""
    shown = Table(box=None, header_style="bold")
    headings = ("ms/step", "CPU ms", "over memory", "CPU over", "cold over", "B/token")
    for heading in ("", *headings):
        shown.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for name in names:
        ratios = [
            found.get(key)
            for key in (
                f"{name}_seconds_over_ram",
                f"{name}_cpu_seconds_over_ram",
                f"cold_{name}_seconds_over_ram" if name in FROM_DISK else "",
            )
        ]
        size = found.get(f"{name}_bytes_a_token")
        shown.add_row(
            ARMS[name],
            *(
                f"{1e3 * found[f'{name}_step_{k}']['median']:,.0f}"
                for k in ("seconds", "cpu_seconds")
            ),
            *(
                "" if r is None else "{median:.3f} ({least:.2f}-{most:.2f})".format(**r)
                for r in ratios
            ),
            "" if size is None else f"{size:,.0f}",
        )
    return shown


def loss_figures(*, quick: bool) -> dict[str, float]:
    """Return memory and time of the losses over those of their plain formulas."""
    return losses.measure(laps=1, batch=2) if quick else losses.measure()


@click.command()
@click.option("--tokens", default=65_536, show_default=True, help="Training tokens.")
@click.option("--length", default=128, show_default=True, help="Tokens of the longest row.")
@click.option("--batch-size", default=16, show_default=True, help="Rows of a batch.")
@click.option("--layers", default=6, show_default=True, help="Blocks of the teacher.")
@click.option("--width", default=384, show_default=True, help="Width of the teacher.")
@click.option("--vocab", default=8192, show_default=True, help="Entries of its vocabulary.")
@click.option("--student-layers", default=3, show_default=True, help="Blocks of the student.")
@click.option("--student-width", default=192, show_default=True, help="Width of the student.")
@click.option("--workers", default=2, show_default=True, help="Processes of a DataLoader.")
@click.option("--laps", default=7, show_default=True, help="Counted epochs of each arm.")
@click.option("--cold-laps", default=5, show_default=True, help="The same, page cache dropped.")
@click.option("--device", default=None, help="Where to train; by default a GPU if there is one.")
@click.option("--quick", is_flag=True, help="Within four minutes on two cores: 8,192 tokens.")
@results_option
def main(
    tokens: int,
    length: int,
    batch_size: int,
    layers: int,
    width: int,
    vocab: int,
    student_layers: int,
    student_width: int,
    workers: int,
    laps: int,
    cold_laps: int,
    device: str | None,
    quick: bool,
    results: Path | None,
) -> None:
    """Measure what a step costs on random data."""
    logging.basicConfig(level="WARNING")
    quiet()
    if quick:
        tokens, batch_size, vocab, laps, cold_laps = 8192, 8, 2048, 5, 2
    maps = {str(i): i * layers // student_layers for i in range(student_layers + 1)}
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    of_losses = loss_figures(quick=quick)
    with tempfile.TemporaryDirectory() as directory:
        # A small segment pays as much for its files as a large one, whose 16,384 tokens hide it. So
        # the quick run mixes one at a time: of four two are in memory, and all are read every lap.
        pool_segments, segment_tokens = (1, tokens // 4) if quick else (2, 8192)
        setting = Setting(
            directory, device, maps, student_width, batch_size, pool_segments, workers
        )
        root = Path(directory)
        ran, sizes = lay_out(
            root,
            setting,
            tokens=tokens,
            length=length,
            segment_tokens=segment_tokens,
            teacher={"layers": layers, "width": width, "vocab": vocab},
        )
        # In one process: two that run the same step differ by more than what is measured here.
        arms = {name: Arm(name, setting) for name in present(ARMS)}
        errors = check(arms, root)
        warm = interleaved(arms, laps)
        on_disk = {name: arms[name] for name in arms if name in ("ram", *FROM_DISK)}
        cold = interleaved(on_disk, cold_laps, "cold", warm_up=0)
        for arm in arms.values():
            arm.close()
        steps = len(Plan(StoreReader(setting.store), setting).batches)
    found = figures(warm, cold, steps, sizes) | of_losses
    found |= {
        "feature_errors": errors,
        "tokens": ran,
        "steps": steps,
        "laps": laps,
        "cold_laps": cold_laps,
        "device": device,
        "sizes": f"teacher {layers} x {width}, student {student_layers} x {student_width}, "
        f"vocabulary {vocab}, rows of up to {length} tokens, {batch_size} a batch, "
        f"{workers} workers",
    }
    console = Console(width=140)
    console.print(f"{found['sizes']}; {steps} steps a lap, {laps} laps: median (least-most)")
    console.print(table(found, list(arms)))
    if not HAS_LITDATA:
        console.print("LitData is not installed, so it is not among them")
    console.print(
        "a live teacher could cost {:.2f} times the step from the store, and costs {:.2f}".format(
            found["live_speedup_possible"]["median"], found["live_speedup"]["median"]
        )
    )
    console.print(f"reading takes {found['reading_over_ram']:.1%} of a step from memory")
    left = max(found["cold_resident_share"].values())
    console.print(f"cold: {left:.1%} of the pages stayed in memory at most; read once a lap")
    if results is not None:
        write("train", found, results)
    click.echo(json.dumps({"figures": found, "machine": machine()}))


if __name__ == "__main__":
    main()
