"""Every student of params.yaml with several seeds, from the store that is there.

Run `python -m benchmarks.seeds --seeds 3` after `dvc repro`: a table of mean and standard deviation
of the test split for people, and one JSON line last. The seed decides a student's first weights and
its order of batches; teacher and store are the same for all. Finished runs are kept in
data/work/seeds, so an interrupted command goes on.
"""

import json
import logging
import statistics
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from pipeline.corpus.tokens.tokens import TokenSet
from pipeline.evaluate.evaluate import evaluate_model
from pipeline.evaluate.load import load_student
from pipeline.provenance import fingerprint, read_json, write_json
from pipeline.runtime import Runtime
from pipeline.student.loop.train import train_student
from pipeline.student.loop.training import Training
from pipeline.student.parameters import StudentParams
from stages.parameters import read_yaml, section
from stages.project import DATA, prepare_torch, runtime, stores

BATCH_TOKENS = 8192
WORK = DATA / "work" / "seeds"
QUALITY = ("test_perplexity", "test_accuracy")


def run_seed(name: str, options: StudentParams, seed: int, device: str) -> dict[str, Any]:
    """Train and measure one student with one seed, or read what an earlier call measured."""
    selected = read_json(DATA / "selected" / f"{name}.json")
    training = options.train.model_copy(update={"seed": seed})
    resolved = options.model_copy(update={"train": training}).model_dump(mode="json")
    directory = WORK / f"{name}-{seed}-{fingerprint([selected, resolved])[:12]}"
    measured = directory / "metrics.json"
    if measured.exists():
        return read_json(measured)
    train_student(
        Training(
            name=f"{name} seed {seed}",
            selected=selected,
            stores=stores(),
            output=directory / "model",
            curve=directory / "curve.csv",
            work=WORK / "checkpoints",
            student=options.model_copy(update={"train": training}),
            runtime=Runtime(device=device),
        )
    )
    tokens = TokenSet.load(DATA / "corpus" / "tokens" / options.teacher)
    model = load_student(directory / "model", task=tokens.meta.task)
    found = evaluate_model(model, tokens, batch_tokens=BATCH_TOKENS, device=torch.device(device))
    write_json(measured, found.metrics)
    return found.metrics


@click.command()
@click.option("--seeds", default=3, show_default=True, help="Seeds 0 to N - 1.")
@click.option("--student", "only", multiple=True, help="Only this student; may be repeated.")
def main(seeds: int, only: tuple[str, ...]) -> None:
    """Train every student with several seeds and print mean and standard deviation."""
    logging.basicConfig(level=logging.WARNING)
    transformers_logging.set_verbosity_error()
    params = Path("params.yaml")
    device = prepare_torch(runtime())
    names = [name for name in read_yaml(params)["students"] if not only or name in only]
    results: dict[str, list[float]] = {}
    for name in names:
        options = section(params, f"students.{name}", StudentParams)
        metrics = [run_seed(name, options, seed, device) for seed in range(seeds)]
        quality = next(key for key in QUALITY if key in metrics[0])
        results[name] = [one[quality] for one in metrics]
    table = Table(box=None, header_style="bold")
    for column in ("student", "mean", "sd", "seeds"):
        table.add_column(column, justify="left" if column == "student" else "right")
    for name, values in results.items():
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        each = ", ".join(f"{value:.4g}" for value in values)
        table.add_row(name, f"{statistics.mean(values):.4g}", f"{spread:.2g}", each)
    Console().print(table)
    click.echo(json.dumps(results))


if __name__ == "__main__":
    main()
