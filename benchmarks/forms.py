"""What a form costs the student: the same student, the same order, another form of the features.

Run `python -m benchmarks.forms` in a project whose teacher is there (after `dvc repro`): one
teacher is captured once, in all forms side by side, into data/work/forms, and one student of
params.yaml is trained from each arm with several seeds. A table for people, and one JSON line
`{"figures": ...}` last. Each run is kept as a JSON file, so an interrupted command goes on, and
`--table data/work/forms/runs` shows what is there. `--bytes` trains nothing and measures what each
form takes. `--quick` is one seed of 20 steps, which only shows that it works.
"""

import json
import logging
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy

from benchmarks.form_arms import DENSE, Arm, arms
from benchmarks.form_bytes import byte_figures, large_vocabulary, measure_bytes, show_bytes
from benchmarks.synthetic import quiet
from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.errors import ConfigError
from pipeline.evaluate.agreement import agreement
from pipeline.evaluate.answers import sequence_logits
from pipeline.evaluate.load import load_student
from pipeline.evaluate.perplexity import perplexity
from pipeline.provenance import fingerprint, read_json, write_json
from pipeline.runtime import Runtime
from pipeline.store.forms.registry import build_form
from pipeline.store.layout import Layout
from pipeline.store.reader import StoreReader
from pipeline.store.signals import Signal
from pipeline.student.align.needs import depth_of, select_signals
from pipeline.student.loop.train import train_student
from pipeline.student.loop.training import Training
from pipeline.student.parameters import StudentParams
from pipeline.tasks import models_language, outputs_of
from pipeline.teacher.capture.capture import capture
from pipeline.teacher.capture.complete import write_manifests
from pipeline.teacher.capture.spec import SegmentOptions
from pipeline.teacher.parameters.capture import CaptureParams
from pipeline.teacher.source.reference import TeacherReference
from stages.parameters import read_yaml, section
from stages.project import DATA

BATCH_TOKENS = 8192
WORK = DATA / "work" / "forms"
CPU = torch.device("cpu")
QUICK_STEPS = 20


@dataclass(frozen=True)
class Project:
    """A teacher of params.yaml, its tokens, and the student that is trained again and again."""

    name: str
    student: StudentParams
    capture: CaptureParams

    @classmethod
    def load(cls, name: str | None) -> "Project":
        """Read params.yaml; the student is by default the first one that learns all three terms."""
        params = Path("params.yaml")
        students = {
            key: section(params, f"students.{key}", StudentParams)
            for key in read_yaml(params)["students"]
        }
        complete = [
            key
            for key, student in students.items()
            if not any(
                term.weight.is_off
                for term in (student.loss.feature, student.loss.attention, student.loss.output)
            )
        ]
        if not (name or complete):
            raise ConfigError("params.yaml: no student with weights on all three terms; add one")
        chosen = name or complete[0]
        student = students[chosen]
        options = section(params, f"teachers.{student.teacher}.capture", CaptureParams)
        return cls(chosen, student, options)

    @property
    def tokens(self) -> Path:
        """The teacher's tokens."""
        return DATA / "corpus" / "tokens" / self.student.teacher

    @property
    def teacher(self) -> Path:
        """The teacher's directory."""
        return DATA / "teachers" / self.student.teacher

    def segments(self) -> SegmentOptions:
        """Return how params.yaml cuts the corpus."""
        names = ("fraction", "limit", "segment_tokens", "chunk_tokens", "batch_tokens", "dtype")
        return SegmentOptions(**{key: getattr(self.capture, key) for key in names})


class Sweep:
    """All runs of one student: one store, a JSON file a run."""

    def __init__(self, project: Project) -> None:
        self.project = project
        self.reference = TeacherReference.load(project.teacher)
        self.meta = TokenSet.load(project.tokens).meta
        own = depth_of(project.student.model.architecture or {})
        self.sizes = {
            "student_layers": own or self.reference.layers,
            "teacher_layers": self.reference.layers,
        }

    def arms(self) -> list[Arm]:
        """Return all arms that this task has."""
        return arms(task=self.meta.task, **self.sizes)

    def signals(self, arm: Arm) -> list[Signal]:
        """Return what an arm's student learns from."""
        return arm.signals(self.project.student.align, task=self.meta.task, **self.sizes)

    def reference_logits(self) -> Signal:
        """Return the logits that every student is compared with, whatever it learnt from."""
        if models_language(self.meta.task):
            return Signal(build_form("logits", "head", {"values": "float16"}), None)
        return Signal(build_form("logits", "dense", {}), None)

    def capture(self, chosen: Sequence[Arm]) -> Path:
        """Bring all that the arms need into one store; what is there stays."""
        wanted = [signal for arm in chosen for signal in self.signals(arm)]
        unique = {signal.name: signal for signal in [*wanted, self.reference_logits()]}
        return capture(
            tokens=self.project.tokens,
            teacher=self.project.teacher,
            stores=WORK / "stores",
            signals=list(unique.values()),
            blocks=[],
            options=self.project.segments(),
            nonfinite="stop",
            runtime=Runtime(device="cpu"),
        )

    def run(self, store: Path, arm: Arm, seed: int, steps: int | None) -> dict[str, Any]:
        """Train and measure one student, or read what an earlier call measured."""
        student = self.project.student
        objective = arm.objective(student.loss)
        options = student.train.model_copy(
            update={"seed": seed} | ({} if steps is None else {"steps": steps})
        )
        manifests = WORK / "manifests" / fingerprint([self.project.name, arm.name])[:12]
        write_manifests(Layout(store), manifests, self.reference, self.signals(arm), [])
        architecture, checkpoint = student.model.architecture, student.model.checkpoint
        selected = select_signals(
            manifests,
            name=self.project.name,
            objective=objective,
            align=arm.alignment(student.align),
            model=student.model,
        )
        terms = objective.model_dump(mode="json")
        made_of = [selected, terms, options.model_dump(mode="json"), architecture, checkpoint]
        identity = fingerprint(made_of)[:12]
        measured = WORK / "runs" / f"{arm.name.replace(' ', '-')}-{seed}-{identity}.json"
        if measured.exists():
            return read_json(measured)
        started = time.perf_counter()
        output = WORK / "students" / identity
        train_student(
            Training(
                name=f"{arm.name} seed {seed}",
                selected=selected,
                stores=WORK / "stores",
                output=output,
                curve=WORK / "curves" / f"{identity}.csv",
                work=WORK / "checkpoints",
                student=student.model_copy(update={"loss": objective, "train": options}),
                runtime=Runtime(device="cpu"),
            )
        )
        found = {
            "arm": arm.name,
            "about": arm.about,
            "student": self.project.name,
            "task": self.meta.task,
            "seed": seed,
            "steps": options.steps,
            "epochs": options.epochs,
            "bytes_per_token": self.bytes_per_token(store, arm),
            **self.measure(store, output),
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_json(measured, found)
        return found

    def bytes_per_token(self, store: Path, arm: Arm) -> dict[str, float]:
        """Return what an arm's signals take in the store a token that has them, by kind."""
        reader = StoreReader(store)
        found: dict[str, float] = {}
        for signal in self.signals(arm):
            stored = reader.signal(signal.name)
            each = stored.bytes / max(1, stored.tokens)
            found[signal.kind] = round(found.get(signal.kind, 0.0) + each, 3)
        return found

    def measure(self, store: Path, directory: Path) -> dict[str, float]:
        """Return the student's loss on true labels and its KL from the teacher, both in nats.

        The loss is the mean over targets of the cross-entropy, of validation and of test.
        """
        tokens = TokenSet.load(self.project.tokens)
        model = load_student(directory, task=self.meta.task)
        found: dict[str, float] = {}
        for split in ("validation", "test"):
            rows = tokens.split(split)
            running: dict[str, Any] = {
                "pad_id": self.meta.pad_id,
                "batch_tokens": BATCH_TOKENS,
                "device": CPU,
            }
            if models_language(self.meta.task):
                found[f"{split}_loss"] = perplexity(model, rows, **running).nats_per_token
            else:
                outputs = outputs_of(self.meta.task, self.meta.classes)
                logits = sequence_logits(model, rows, outputs=outputs, **running)
                labels = torch.tensor(rows["label"][:])
                found[f"{split}_loss"] = float(cross_entropy(logits, labels))
                found[f"{split}_accuracy"] = float((logits.argmax(-1) == labels).float().mean())
        name = self.reference_logits().name
        digest = StoreReader(store).signal(name).digest
        compared = agreement(model, store, name, digest, batch_tokens=BATCH_TOKENS, device=CPU)
        return found | {f"test_{key}": value for key, value in compared.items()}


def compare(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row an arm: what it stores and how its losses stand to dense, seed by seed.

    The ratio of a seed is of the test loss to that of `dense` with the same seed, so that first
    weights and order of batches are the same on both sides.
    """
    dense = {run["seed"]: run for run in runs if run["arm"] == DENSE.name}
    rows = []
    for name in dict.fromkeys(run["arm"] for run in runs):
        mine = [run for run in runs if run["arm"] == name and run["seed"] in dense]
        if not mine:
            continue
        row: dict[str, Any] = {"arm": name, "seeds": len(mine)}
        for key in ("test_loss", "test_kl"):
            ratios = [run[key] / dense[run["seed"]][key] for run in mine]
            row[key] = statistics.mean(run[key] for run in mine)
            row[f"{key}_over_dense"] = statistics.mean(ratios)
            row[f"{key}_spread"] = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
        row["bytes_per_token"] = mine[0]["bytes_per_token"]
        rows.append(row)
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table for people."""
    table = Table(box=None, header_style="bold")
    table.add_column("arm")
    for column in ("hidden B", "attention B", "logits B", "loss", "/ dense", "KL", "/ dense", "n"):
        table.add_column(column, justify="right")
    for row in rows:
        stored = row["bytes_per_token"]
        table.add_row(
            row["arm"],
            *(f"{stored.get(kind, 0):.0f}" for kind in ("hidden", "attention", "logits")),
            f"{row['test_loss']:.4f}",
            f"{row['test_loss_over_dense']:.4f} ± {row['test_loss_spread']:.4f}",
            f"{row['test_kl']:.4f}",
            f"{row['test_kl_over_dense']:.4f} ± {row['test_kl_spread']:.4f}",
            str(row["seeds"]),
        )
    Console(width=140).print(table)


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return the JSON line's figures: each arm's loss over dense."""
    return {row["arm"]: round(row["test_loss_over_dense"], 5) for row in rows}


@click.command()
@click.option("--student", default=None, help="Of params.yaml; by default one with all terms.")
@click.option("--seeds", default=3, show_default=True, help="Seeds 0 to N - 1.")
@click.option("--arm", "only", multiple=True, help="Only this arm beside dense; may be repeated.")
@click.option("--quick", is_flag=True, help="One seed of 20 steps, three arms: does it work?")
@click.option(
    "--table", type=click.Path(path_type=Path), help="Train nothing: show the runs of a directory."
)
@click.option("--bytes", "sizes", is_flag=True, help="Train nothing: measure bytes and errors.")
def main(
    student: str | None,
    seeds: int,
    only: tuple[str, ...],
    quick: bool,
    table: Path | None,
    sizes: bool,
) -> None:
    """Train one student from every form and compare what it learns."""
    logging.basicConfig(level=logging.WARNING)
    quiet()
    if sizes:
        project = Project.load(student)
        found = measure_bytes(
            tokens=project.tokens,
            teacher=project.teacher,
            stores=WORK / "bytes",
            layer=TeacherReference.load(project.teacher).layers,
        )
        found += large_vocabulary()
        show_bytes(found)
        click.echo(json.dumps({"figures": byte_figures(found), "rows": found}))
        return
    if table is None:
        sweep = Sweep(Project.load(student))
        chosen = [arm for arm in sweep.arms() if not only or arm.name in (DENSE.name, *only)]
        chosen = chosen[:3] if quick else chosen
        store = sweep.capture(chosen)
        runs = [
            sweep.run(store, arm, seed, QUICK_STEPS if quick else None)
            for arm in chosen
            for seed in range(1 if quick else seeds)
        ]
    else:
        paths = sorted(table.glob("*.json"), key=lambda path: path.stat().st_mtime)
        runs = [read_json(path) for path in paths]
    rows = compare(runs)
    show(rows)
    click.echo(json.dumps({"figures": figures(rows), "rows": rows}))


if __name__ == "__main__":
    main()
