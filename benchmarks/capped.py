"""A student trains where its teacher does not fit: memory is capped, and both ways are tried.

Run `python -m benchmarks.capped`: tables for people, and one JSON line last. A random Llama of
about 0.36 B parameters (1.4 GB in float32) is captured once. Then a student of 11 M trains from the
store with features, attention and the head's distribution, and beside the teacher in one process,
each in a process of its own: first free, to see what each takes; then under a cap a tenth above
what the store's way took. On a CPU the cap is the address space (`ulimit -v`), which counts mapped
files and libraries; on a GPU it is the share of the device's memory that torch may take.

The second table is stage two's peak over that of training on labels alone: `whole` with all that
the process holds, `held` with one batch in memory, taken from the store before, so that neither
pools of segments nor reading count, which on a GPU lie on the host. Above libraries is what is left
when the memory after the imports is taken off both sides; `plain` is labels alone by transformers'
own loss, with all logits at once.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.capped_arms import LEARNT, QUICK, Size, capture_once, child
from benchmarks.results import results_option, write
from benchmarks.synthetic import machine, quiet

OVER = 1.1
"""The cap over what the store's way takes."""


def run(arm: str, size: Size, root: Path, device: str, **order: Any) -> dict[str, Any]:
    """Train one arm in a process of its own."""
    asked = {"arm": arm, "root": str(root), "device": device, "cap": None, "held": False}
    asked |= {"size": asdict(size)} | order
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.capped", "--child", json.dumps(asked)],
        capture_output=True,
        text=True,
        env=os.environ | {"TQDM_DISABLE": "1"},
        check=False,
    )
    lines = found.stdout.splitlines()
    if found.returncode or not lines:
        last = (found.stderr.strip().splitlines() or ["no word"])[-1]
        return {"error": f"exit {found.returncode}: {last[:200]}"}
    return json.loads(lines[-1])


def measure(size: Size, root: Path, device: str) -> dict[str, Any]:
    """Return what both ways take, how they end under the cap, and peaks over labels alone."""
    free = {arm: run(arm, size, root, device) for arm in LEARNT}
    for arm, found in free.items():
        if "error" in found:
            raise click.ClickException(f"{arm}: {found['error']}")
    cap = round(OVER * free["aligned"]["capped_bytes"])
    held = {arm: run(arm, size, root, device, held=True) for arm in LEARNT if arm != "live"}
    labels, held_labels = free["labels"], held["labels"]
    return {
        "cap_bytes": cap,
        "cap_above_libraries_bytes": cap - free["aligned"]["library_capped_bytes"],
        "free": free,
        "capped": {arm: run(arm, size, root, device, cap=cap) for arm in ("aligned", "live")},
        "held": held,
        "peak_over_labels": {
            arm: {
                "whole": free[arm]["peak_bytes"] / labels["peak_bytes"],
                "held": held[arm]["peak_bytes"] / held_labels["peak_bytes"],
                "held_above_libraries": _above(held[arm]) / _above(held_labels),
            }
            for arm in held
        },
        "speed_over_live": free["aligned"]["tokens_a_second"] / free["live"]["tokens_a_second"],
    }


def _above(found: Mapping[str, Any]) -> float:
    return found["peak_bytes"] - found["library_bytes"]


def show(found: Mapping[str, Any], weights: int) -> None:
    """Print the tables for people."""
    console = Console(width=120)
    console.print(
        f"cap {found['cap_bytes'] / 1e9:.2f} GB, {found['cap_above_libraries_bytes'] / 1e9:.2f} GB "
        f"above the libraries; the teacher's weights alone take {weights / 1e9:.2f} GB"
    )
    table = Table(box=None, header_style="bold")
    for heading in ("", "counted by the cap, GB", "peak GB", "tokens/s", "under the cap"):
        table.add_column(heading, justify="right" if heading else "left")
    for arm, name in (("aligned", "from the store"), ("live", "beside the teacher")):
        one, capped = found["free"][arm], found["capped"][arm]
        ended = capped.get("error") or f"trains, {capped['tokens_a_second']:,.0f} tokens/s"
        sizes = (f"{one[key] / 1e9:.2f}" for key in ("capped_bytes", "peak_bytes"))
        table.add_row(name, *sizes, f"{one['tokens_a_second']:,.0f}", ended)
    console.print(table)
    table = Table(box=None, header_style="bold")
    for heading in ("peak over labels", "GB", "whole", "held", "held, above libraries"):
        table.add_column(heading, justify="right")
    for arm, ratios in found["peak_over_labels"].items():
        peak = f"{found['free'][arm]['peak_bytes'] / 1e9:.2f}"
        table.add_row(arm, peak, *(f"{ratio:.2f}" for ratio in ratios.values()))
    console.print(table)


@click.command()
@click.option("--quick", is_flag=True, help="A small teacher, in two minutes.")
@click.option("--work", type=click.Path(path_type=Path), help="Keep the capture here for again.")
@click.option("--device", default=None, help="By default cuda where there is one.")
@click.option("--child", "order", default=None, hidden=True)
@results_option
def main(
    quick: bool, work: Path | None, device: str | None, order: str | None, results: Path | None
) -> None:
    """Train where the teacher does not fit."""
    logging.basicConfig(level="ERROR")
    quiet()
    if order is not None:
        click.echo(json.dumps(child(json.loads(order))))
        return
    size = QUICK if quick else Size()
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as directory:
        root = work or Path(directory)
        if not (root / "stores").is_dir():
            capture_once(size, root, device)
        weights = sum(path.stat().st_size for path in (root / "teacher").rglob("*.safetensors"))
        found = measure(size, root, device)
    show(found, weights)
    figures = {"teacher_bytes": weights, **found, "size": asdict(size), "device": device}
    if results is not None:
        write("capped", figures, results)
    click.echo(json.dumps({"figures": figures, "machine": machine()}))


if __name__ == "__main__":
    main()
