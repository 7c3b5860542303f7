"""What mixing a few segments at a time costs a student, against mixing the whole corpus.

Run `python -m benchmarks.shuffling` in a project whose teacher is there (after `dvc repro`, or
`decant teach T`): its training rows are captured into about 64 segments and one student of
params.yaml is trained with several pools and seeds. A table for people, and one JSON line last.

Segments are dealt from a seeded permutation of the rows, so a pool of one is already a random
sample. Two arms hold that up to the light: rows dealt in a bad order, sorted by class, or without
classes by how rare their words are, and rows dealt by another permutation, whose difference is
nothing but another order of batches. All arms have the same rows, and a seed gives the same first
weights in all; the order of batches differs between arms, and between seeds. Runs are kept as JSON
files, so an interrupted command goes on.
"""

import json
import logging
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student_t

from benchmarks.form_arms import Arm as Forms
from benchmarks.forms import Project, Sweep
from benchmarks.results import results_option, write
from benchmarks.synthetic import machine, quiet
from pipeline.axes import TRAIN
from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.provenance import fingerprint, read_json, write_json
from pipeline.runtime import Runtime
from pipeline.store import plan
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.student.align.needs import select_signals
from pipeline.student.loop.train import train_student
from pipeline.student.loop.training import Training
from pipeline.teacher.capture.capture import capture
from pipeline.teacher.capture.complete import write_manifests
from pipeline.teacher.capture.spec import SegmentOptions
from stages.project import DATA, prepare_torch, runtime

WORK = DATA / "work" / "shuffling"
CHUNK = 64
STORED = Forms(
    "defaults", hidden=("int8", {}), attention=("qk", {}), logits=("head", {"values": "int8"})
)
Ints = NDArray[np.int64]
Dealt = Literal["as captured", "sorted", "anew"]


@dataclass(frozen=True)
class Arm:
    """How batches are mixed: a pool of so many segments (None: of all), dealt in some order."""

    name: str
    pool: int | None
    dealt: Dealt = "as captured"


WHOLE = Arm("all segments", None)
ARMS = (
    WHOLE,
    Arm("4 segments", 4),
    Arm("1 segment", 1),
    Arm("all, another order", None, "anew"),
    Arm("sorted, 4 segments", 4, "sorted"),
    Arm("sorted, 1 segment", 1, "sorted"),
)


@contextmanager
def dealing(tokens: TokenSet, dealt: Dealt) -> Iterator[None]:
    """Let a capture deal the same training rows to segments in another order."""
    plain = plan._chosen  # the one place where rows are permuted

    def chosen(parts: Sequence[int], split: str, *options: Any) -> Iterator[Ints]:
        for rows in plain(parts, split, *options):
            if split != TRAIN or dealt == "as captured":
                yield rows
            elif dealt == "anew":
                yield np.random.default_rng(len(rows)).permutation(rows)
            else:
                yield rows[np.argsort(difficulty(tokens)[rows], kind="stable")]

    plan._chosen = chosen
    try:
        yield
    finally:
        plan._chosen = plain


def difficulty(tokens: TokenSet) -> NDArray[np.float64]:
    """Return what training rows are sorted by: class, or the mean rarity of a row's ids in nats."""
    rows = tokens.split(TRAIN)
    if tokens.meta.classes:
        return np.asarray(rows["label"][:], dtype=np.float64)
    ids = [np.asarray(row) for row in rows["input_ids"]]
    counts = np.bincount(np.concatenate(ids), minlength=tokens.meta.vocab)
    rarity = -np.log(np.maximum(counts, 1) / counts.sum())
    return np.array([rarity[row].mean() for row in ids])


class Study:
    """All runs of one student: a store for each way to deal, a JSON file a run."""

    def __init__(self, project: Project, segments: int) -> None:
        self.project = project
        self.sweep = Sweep(project)
        self.tokens = TokenSet.load(project.tokens)
        options = project.segments()
        share = self.tokens.meta.tokens["train"] * options.fraction / segments
        # Whole chunks, and room for the longest row.
        needed = max(share, self.tokens.meta.max_length)
        self.options = SegmentOptions(
            fraction=options.fraction,
            limit=options.limit,
            segment_tokens=CHUNK * -(-round(needed) // CHUNK),
            chunk_tokens=CHUNK,
            batch_tokens=options.batch_tokens,
            dtype=options.dtype,
        )
        self.signals = self.sweep.signals(STORED)

    def store(self, dealt: Dealt) -> Path:
        """Capture into a store of its own; what is there stays."""
        reference = self.sweep.reference_logits()
        signals = {signal.name: signal for signal in (*self.signals, reference)}
        with dealing(self.tokens, dealt):
            return capture(
                tokens=self.project.tokens,
                teacher=self.project.teacher,
                stores=WORK / "stores" / dealt.replace(" ", "-"),
                signals=list(signals.values()),
                blocks=[],
                options=self.options,
                nonfinite="stop",
                runtime=Runtime(device="cpu"),
            )

    def run(self, arm: Arm, seed: int, steps: int | None, device: str) -> dict[str, Any]:
        """Train and measure one student, or read what an earlier call measured."""
        store = self.store(arm.dealt)
        student = self.project.student
        objective = STORED.objective(student.loss)
        options = student.train.model_copy(
            update={"seed": seed} | ({} if steps is None else {"steps": steps})
        )
        manifests = WORK / "manifests" / arm.dealt.replace(" ", "-")
        write_manifests(Layout(store), manifests, self.sweep.reference, self.signals, [])
        selected = select_signals(
            manifests,
            name=self.project.name,
            objective=objective,
            align=student.align,
            model=student.model,
        )
        segments = len(StoreReader(store).segments(TRAIN, None))
        pool = arm.pool or segments
        model = student.model.model_dump(mode="json")
        terms, training = objective.model_dump(mode="json"), options.model_dump(mode="json")
        identity = fingerprint([selected, terms, training, model, pool])[:12]
        name = arm.name.replace(",", "").replace(" ", "-")
        measured = WORK / "runs" / f"{name}-{seed}-{identity}.json"
        if measured.exists():
            return read_json(measured)
        started = time.perf_counter()
        output = WORK / "students" / identity
        train_student(
            Training(
                name=f"{arm.name}, seed {seed}",
                selected=selected,
                stores=store.parent,
                output=output,
                curve=WORK / "curves" / f"{identity}.csv",
                work=WORK / "checkpoints",
                student=student.model_copy(
                    update={"loss": objective, "train": options, "pool_segments": pool}
                ),
                runtime=Runtime(device=device),
            )
        )
        found = {
            "arm": arm.name,
            "student": self.project.name,
            "task": self.tokens.meta.task,
            "seed": seed,
            "segments": segments,
            "segment_tokens": self.options.segment_tokens,
            **self.sweep.measure(store, output),
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_json(measured, found)
        return found


def compare(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a row an arm: means, and the paired difference from mixing all, seed by seed.

    A difference has its 95% interval by Student's t over seeds, None where there is one seed.
    """
    whole = {run["seed"]: run for run in runs if run["arm"] == WHOLE.name}
    rows = []
    for arm in ARMS:
        mine = [run for run in runs if run["arm"] == arm.name and run["seed"] in whole]
        if not mine:
            continue
        row: dict[str, Any] = {"arm": arm.name, "seeds": len(mine)}
        for key in ("test_loss", "test_kl", "test_accuracy"):
            if key not in mine[0]:
                continue
            values = [run[key] for run in mine]
            differences = [run[key] - whole[run["seed"]][key] for run in mine]
            row[key] = statistics.mean(values)
            row[f"{key}_sd"] = _deviation(values)
            row[f"{key}_over_all"] = statistics.mean(differences)
            row[f"{key}_interval"] = _half_width(differences)
        rows.append(row)
    return rows


def _deviation(values: Sequence[float]) -> float | None:
    return statistics.stdev(values) if len(values) > 1 else None


def _half_width(values: Sequence[float]) -> float | None:
    deviation = _deviation(values)
    if deviation is None:
        return None
    quantile = float(student_t.ppf(0.975, len(values) - 1))
    return quantile * deviation / len(values) ** 0.5


def show(rows: Sequence[Mapping[str, Any]], about: str) -> None:
    """Print the table for people."""
    Console(width=140).print(about)
    keys = [key for key in ("test_loss", "test_kl", "test_accuracy") if key in rows[0]]
    table = Table(box=None, header_style="bold")
    table.add_column("mixed")
    for key in keys:
        table.add_column(key.removeprefix("test_"), justify="right")
        table.add_column("- all", justify="right")
    table.add_column("n", justify="right")
    for row in rows:
        cells = []
        for key in keys:
            cells.append(f"{row[key]:.4f}{_plus_minus(row[f'{key}_sd'])}")
            cells.append(f"{row[f'{key}_over_all']:+.4f}{_plus_minus(row[f'{key}_interval'])}")
        table.add_row(row["arm"], *cells, str(row["seeds"]))
    Console(width=140).print(table)


def _plus_minus(value: float | None) -> str:
    return "" if value is None else f" ± {value:.4f}"


@click.command()
@click.option("--student", default=None, help="Of params.yaml; by default one with all terms.")
@click.option("--seeds", default=3, show_default=True, help="Seeds 0 to N - 1.")
@click.option("--segments", default=64, show_default=True, help="Training segments, about.")
@click.option("--steps", default=None, type=int, help="Instead of the student's own epochs.")
@click.option("--arm", "only", multiple=True, help="Only this arm beside all segments; repeatable.")
@click.option(
    "--table", type=click.Path(path_type=Path), help="Train nothing: show the runs of a directory."
)
@click.option("--quick", is_flag=True, help="Two seeds of 20 steps, which only shows it works.")
@results_option
def main(
    student: str | None,
    seeds: int,
    segments: int,
    steps: int | None,
    only: tuple[str, ...],
    table: Path | None,
    quick: bool,
    results: Path | None,
) -> None:
    """Train one student with several pools and compare what it learns."""
    logging.basicConfig(level=logging.WARNING)
    quiet()
    if table is None:
        study = Study(Project.load(student), segments)
        device = prepare_torch(runtime())
        chosen = [arm for arm in ARMS if not only or arm.name in (WHOLE.name, *only)]
        # Seed by seed, so that what is there can be compared at any time.
        runs = [
            study.run(arm, seed, 20 if quick else steps, device)
            for seed in range(2 if quick else seeds)
            for arm in chosen
        ]
    else:
        runs = [read_json(path) for path in sorted(table.glob("*.json"))]
    rows = compare(runs)
    one = runs[0]
    about = f"{one['student']}, {one['segments']} segments of {one['segment_tokens']} tokens"
    show(rows, f"{about}; ± is the deviation over seeds, and 95% intervals of paired differences")
    figures = {row["arm"]: round(row["test_loss_over_all"], 5) for row in rows}
    if results is not None:
        keys = ("student", "task", "segments", "segment_tokens")
        found = {"about": {key: one[key] for key in keys}, "rows": rows}
        write(f"shuffling-{one['task']}", found, results)
    click.echo(json.dumps({"figures": figures, "rows": rows, "machine": machine()}))


if __name__ == "__main__":
    main()
