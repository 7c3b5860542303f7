"""Four students of one store at once, against the same four one after the other.

Run `python -m benchmarks.students`: a table for people, and one JSON line last. A random Llama of 6
layers is captured once with its default signals; four students of other widths and rates train an
epoch of it, by `train_together` and by `train_student` four times. Each way is a process of its own
and they take turns; what is measured begins after the imports, which four commands would pay four
times. Before anything is compared, the weights of all students must be equal bit for bit.
"""

import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.results import results_option, write
from benchmarks.synthetic import (
    default_signals,
    machine,
    quiet,
    stopwatch,
    write_corpus,
    write_teacher,
)
from benchmarks.turns import peak_bytes, spread
from pipeline.runtime import Runtime
from pipeline.store.layout import Layout
from pipeline.store.reader import Segment, StoreReader
from pipeline.student.align.needs import select_signals
from pipeline.student.align.objective import Alignment, Objective
from pipeline.student.loop.together import train_together
from pipeline.student.loop.train import Training, train_student
from pipeline.student.model.origin import StudentModel
from pipeline.student.parameters import StudentParams
from pipeline.teacher.capture.capture import capture
from pipeline.teacher.capture.complete import write_manifests
from pipeline.teacher.capture.spec import SegmentOptions
from pipeline.teacher.source.reference import TeacherReference
from pipeline.training.options import TrainOptions

ARMS = ("one by one", "together")
OBJECTIVE = Objective.model_validate(
    {term: {"weight": 1.0} for term in ("feature", "attention", "output")}
)
WIDTHS = (64, 96, 96, 128)


@dataclass(frozen=True)
class Size:
    """Teacher and corpus; rows have 8 to 128 tokens."""

    tokens: int = 131_072
    layers: int = 6
    width: int = 384
    segment_tokens: int = 8192
    batch: int = 16


QUICK = Size(tokens=16_384, width=192, segment_tokens=2048)


def capture_once(size: Size, root: Path) -> None:
    """Write corpus and teacher, capture, and write what a student is selected from."""
    write_corpus(root / "tokens", train_tokens=size.tokens)
    reference = write_teacher(root / "teacher", layers=size.layers, width=size.width)
    signals = default_signals(size.layers)
    store = capture(
        tokens=root / "tokens",
        teacher=root / "teacher",
        stores=root / "stores",
        signals=signals,
        blocks=[],
        options=SegmentOptions(segment_tokens=size.segment_tokens),
        nonfinite="stop",
        runtime=Runtime(device="cpu"),
    )
    write_manifests(Layout(store), root / "manifests", reference, signals, [])


def trainings(size: Size, root: Path, output: Path) -> list[Training]:
    """Return the students: half as deep as the teacher, of several widths and rates."""
    heads = int(TeacherReference.load(root / "teacher").config["num_attention_heads"])
    found = []
    for number, width in enumerate(WIDTHS):
        architecture = {
            "num_hidden_layers": size.layers // 2,
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "head_dim": width // heads,
        }
        model = StudentModel(architecture=architecture)
        name = f"student-{number}"
        selected = select_signals(
            root / "manifests",
            name=name,
            objective=OBJECTIVE,
            align=Alignment(),
            model=model,
        )
        found.append(
            Training(
                name=name,
                selected=selected,
                stores=root / "stores",
                output=output / name,
                curve=output / f"{name}.csv",
                work=output / "work",
                student=StudentParams(
                    teacher="main",
                    model=model,
                    loss=OBJECTIVE,
                    train=TrainOptions(
                        epochs=1,
                        batch_size=size.batch,
                        learning_rate=1e-3 * (number + 1),
                        save_every=10**6,
                    ),
                ),
                runtime=Runtime(device="cpu"),
            )
        )
    return found


def child(arm: str, size: Size, root: Path) -> dict[str, Any]:
    """Train the four in this process and say what it took."""
    plain = StoreReader.read_segment
    decoded: list[int] = []

    def counted(self: StoreReader, segment: int, signals: Sequence[str] = ()) -> Segment:
        decoded.append(segment)
        return plain(self, segment, signals)

    StoreReader.read_segment = counted
    with tempfile.TemporaryDirectory() as directory:
        asked = trainings(size, root, Path(directory))
        Path("/proc/self/clear_refs").write_text("5")
        before = _bytes_read()
        with stopwatch() as watch:
            if arm == "together":
                train_together(asked)
            else:
                for one in asked:
                    train_student(one)
        read = _bytes_read() - before
        weights = [(one.output / "model.safetensors").read_bytes() for one in asked]
    return {
        "seconds": watch.seconds,
        "cpu_seconds": watch.cpu_seconds,
        "bytes_read": read,
        "segments_decoded": len(decoded),
        "peak_bytes": peak_bytes(),
        "weights": [sha256(one).hexdigest() for one in weights],
    }


def _bytes_read() -> int:
    """Return what this process has read of files, from a disk or from the page cache."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


def run(arm: str, size: Size, root: Path) -> dict[str, Any]:
    """Run one way in a process of its own; `import_seconds` is what came before it began."""
    order = json.dumps({"arm": arm, "size": asdict(size), "root": str(root)})
    started = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.students", "--child", order],
        capture_output=True,
        text=True,
        env=os.environ | {"TQDM_DISABLE": "1"},
        check=False,
    )
    whole = time.perf_counter() - started
    if found.returncode:
        raise click.ClickException(f"{arm}: {found.stderr.strip().splitlines()[-1]}")
    answer = json.loads(found.stdout.splitlines()[-1])
    return answer | {"import_seconds": whole - answer["seconds"]}


def measure(size: Size, root: Path, laps: int) -> dict[str, Any]:
    """Return the laps of both ways and what one takes over the other."""
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for lap in range(laps):
        for arm in ARMS[:: -1 if lap % 2 else 1]:
            found[arm].append(run(arm, size, root))
    weights = {tuple(one.pop("weights")) for runs in found.values() for one in runs}
    if len(weights) > 1:
        raise click.ClickException("the students differ between the two ways; expected equal bits")
    keys = ("seconds", "cpu_seconds", "bytes_read", "segments_decoded", "peak_bytes")
    return {
        "students": len(WIDTHS),
        "together_over_one_by_one": {key: spread(_ratios(found, key)) for key in keys},
        **{
            arm: {key: statistics.median(one[key] for one in runs) for key in runs[0]}
            for arm, runs in found.items()
        },
    }


def _ratios(found: Mapping[str, Sequence[Mapping[str, float]]], key: str) -> list[float]:
    pairs = zip(found["together"], found["one by one"], strict=True)
    return [together[key] / alone[key] for together, alone in pairs]


def show(found: Mapping[str, Any]) -> None:
    """Print the table for people."""
    table = Table(box=None, header_style="bold")
    table.add_column(f"{found['students']} students")
    for heading in ("wall s", "CPU s", "MB read", "segments decoded", "peak GB"):
        table.add_column(heading, justify="right")
    for arm in ARMS:
        one = found[arm]
        table.add_row(
            arm,
            f"{one['seconds']:.1f}",
            f"{one['cpu_seconds']:.1f}",
            f"{one['bytes_read'] / 1e6:.1f}",
            f"{one['segments_decoded']:.0f}",
            f"{one['peak_bytes'] / 1e9:.2f}",
        )
    ratios = found["together_over_one_by_one"].values()
    shown = ("{median:.3f} ({least:.2f}-{most:.2f})".format(**one) for one in ratios)
    table.add_row("together / one by one", *shown)
    Console(width=130).print(table)


@click.command()
@click.option("--laps", default=3, show_default=True, help="Turns of both ways.")
@click.option("--quick", is_flag=True, help="A small store and one lap.")
@click.option("--child", "order", default=None, hidden=True)
@results_option
def main(laps: int, quick: bool, order: str | None, results: Path | None) -> None:
    """Train four students at once and one after the other."""
    logging.basicConfig(level="ERROR")
    quiet()
    if order is not None:
        asked = json.loads(order)
        click.echo(json.dumps(child(asked["arm"], Size(**asked["size"]), Path(asked["root"]))))
        return
    size = QUICK if quick else Size()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        capture_once(size, root)
        found = measure(size, root, 1 if quick else laps)
    show(found)
    figures = {**found, "size": asdict(size)}
    if results is not None:
        write("students", figures, results)
    click.echo(json.dumps({"figures": figures, "machine": machine()}))


if __name__ == "__main__":
    main()
