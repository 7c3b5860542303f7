"""Losses in chunks beside plain autograd with everything at once: peak memory, time, gradients.

The full-vocabulary KL with both head products, and the KL of attention maps of six layers. Every
step runs in a process of its own, the arms in turns, so that a busy minute meets both.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
from safetensors.torch import load_file

from benchmarks.results import results_option, write

MIB = 2**20
BATCH, SEQ = 8, 512
"""Of the attention maps; 12 heads."""


def measure(
    *,
    rows: int = 2048,
    vocab: int = 131_072,
    width: int = 512,
    laps: int = 3,
    batch: int = BATCH,
    seq: int = SEQ,
) -> dict[str, float]:
    """Return ours over plain: peak and time, and the largest relative difference of a gradient.

    Peak is what a step adds to what the process held before; time is the fastest lap's.

    Args:
        rows: Positions of the KL over the vocabulary.
        vocab: Size of the vocabulary.
        width: Width of both heads' inputs.
        laps: Steps of each arm.
        batch: Examples of the attention maps.
        seq: Their tokens.
    """
    head = {"rows": rows, "vocab": vocab, "width": width}
    found: dict[str, float] = {}
    for what, sizes in (("loss", head), ("attention", {"batch": batch, "seq": seq})):
        found |= {f"{what}_{key}": value for key, value in _compare(what, sizes, laps).items()}
    return found


def _compare(what: str, sizes: Mapping[str, int], laps: int) -> dict[str, float]:
    laps_of: dict[str, list[dict[str, float]]] = {"full": [], "our": []}
    with tempfile.TemporaryDirectory() as directory:
        kept = {arm: Path(directory) / f"{arm}.safetensors" for arm in laps_of}
        for lap in range(laps):
            for arm, done in laps_of.items():
                keep = str(kept[arm]) if lap == 0 else None
                done.append(_run(f"{arm}_{what}", keep, sizes))
        full, ours = (load_file(kept[arm]) for arm in ("full", "our"))
    difference = max(float((ours[key] - full[key]).norm() / full[key].norm()) for key in full)
    seconds = {arm: min(lap["seconds"] for lap in done) for arm, done in laps_of.items()}
    peak = {arm: max(lap["bytes"] for lap in done) for arm, done in laps_of.items()}
    return {
        "peak_over_full": peak["our"] / peak["full"],
        "time_over_full": seconds["our"] / seconds["full"],
        "gradient_difference": difference,
        **{f"{arm}_peak_mib": peak[arm] / MIB for arm in laps_of},
        **{f"{arm}_seconds": seconds[arm] for arm in laps_of},
    }


def _run(arm: str, keep: str | None, sizes: Mapping[str, int]) -> dict[str, float]:
    given: dict[str, Any] = {"arm": arm, "keep": keep, "sizes": sizes}
    command = [sys.executable, "-m", "benchmarks.loss_arms", json.dumps(given)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@click.command()
@click.option("--rows", default=2048, show_default=True)
@click.option("--vocab", default=131_072, show_default=True)
@click.option("--width", default=512, show_default=True)
@click.option("--laps", default=3, show_default=True)
@click.option("--quick", is_flag=True, help="An eighth of the rows and examples, one lap.")
@results_option
def main(rows: int, vocab: int, width: int, laps: int, quick: bool, results: Path | None) -> None:
    """Measure losses in chunks beside losses at once."""
    batch = BATCH
    if quick:
        rows, batch, laps = rows // 8, 1, 1
    found = measure(rows=rows, vocab=vocab, width=width, laps=laps, batch=batch)
    sizes = {
        "loss": f"forward KL, {rows} rows, vocabulary {vocab}, width {width}",
        "attention": f"attention KL, 6 layers, {batch} x 12 x {SEQ} x {SEQ}",
    }
    for what, title in sizes.items():
        click.echo(title)
        click.echo(f"{'':>12} {'peak, MiB':>10} {'seconds':>8}")
        for arm, name in (("full", "at once"), ("our", "in chunks")):
            peak, seconds = found[f"{what}_{arm}_peak_mib"], found[f"{what}_{arm}_seconds"]
            click.echo(f"{name:>12} {peak:>10.0f} {seconds:>8.2f}")
        peak, time = found[f"{what}_peak_over_full"], found[f"{what}_time_over_full"]
        click.echo(f"{'ratio':>12} {peak:>10.3f} {time:>8.2f}")
        click.echo(
            f"largest difference of a gradient: {found[f'{what}_gradient_difference']:.1e}\n"
        )
    if results is not None:
        write("losses", found, results)
    click.echo(json.dumps(found))


if __name__ == "__main__":
    main()
