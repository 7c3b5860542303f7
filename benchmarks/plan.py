"""What a plan says beside what the capture then took: from the configuration alone, and probed.

Run `python -m benchmarks.plan --teacher DIRECTORY --files GLOB` with a trained causal model and
texts; `--quick` takes fewer of them. A table for people, and one JSON line last.
"""

import contextlib
import json
import tempfile
from pathlib import Path
from typing import Any

import click
from click.testing import CliRunner
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML

from benchmarks.synthetic import machine, quiet
from stages.cli import main as decant
from stages.plan import plan

FORMS: dict[str, list[dict[str, Any]]] = {
    "hidden": [{"form": name} for name in ("float16", "bfloat16", "int8", "fp8", "int4")],
    "attention": [{"form": name} for name in ("qk", "map")],
    "logits": [{"form": "head"}, {"form": "topk", "k": 64}, {"form": "sampled", "n": 32}],
}


def parameters(teacher: Path, files: str, texts: int, logits: dict[str, Any]) -> dict[str, Any]:
    """Return the parameters of a project that captures one layer in every form."""
    capture = {
        kind: [{"layers": [2], **form} for form in FORMS[kind]] for kind in ("hidden", "attention")
    }
    source = {"kind": "table", "files": {"train": files}, "limit": texts}
    student = {
        "teacher": "main",
        "model": {"architecture": {"num_hidden_layers": 2}},
        "loss": {"labels": {"weight": 1.0}},
    }
    return {
        "corpus": {"source": source, "task": "causal-lm"},
        "teachers": {
            "main": {
                "tokens": {"max_length": 256},
                "model": {"path": str(teacher)},
                "fit": None,
                "capture": {**capture, "logits": logits},
            }
        },
        "students": {"small": student},
        "evaluate": {},
    }


def run(*arguments: str) -> str:
    """Run a command of the project and return what it printed."""
    command, rest = (plan, arguments[1:]) if arguments[0] == "plan" else (decant, arguments)
    result = CliRunner().invoke(command, list(rest), catch_exceptions=False)
    if result.exit_code:
        raise click.ClickException(result.output)
    return result.stdout


def compare(params: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Plan, probe, capture; return the bytes of each signal and of all."""
    with Path("params.yaml").open("w", encoding="utf-8") as file:
        YAML().dump(params, file)
    planned = json.loads(run("plan", "main", "--json"))
    for stage in ("prepare", "tokenize main", "teach main", "generate main"):
        run(*stage.split())
    probed = json.loads(run("plan", "main", "--json", "--probe"))
    run("capture", "main")
    took = json.loads(run("plan", "main", "--json"))
    found = {
        f"{one['kind']} {one['form']}": {
            "planned": one["expected_bytes"],
            "probed": other["expected_bytes"],
            "took": third["took_bytes"],
        }
        for one, other, third in zip(
            planned["signals"], probed["signals"], took["signals"], strict=True
        )
    }
    whole = {"planned": planned["total"]["expected_bytes"]}
    whole["probed"], whole["took"] = probed["total"]["expected_bytes"], took["total"]["took_bytes"]
    return {**found, f"store with {params['teachers']['main']['capture']['logits']['form']}": whole}


@click.command()
@click.option("--teacher", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--files", required=True, help="JSON lines with a key `text`, or a glob of them.")
@click.option("--texts", type=int, default=3000, show_default=True)
@click.option("--quick", is_flag=True, help="A tenth of the texts.")
def main(teacher: Path, files: str, texts: int, quick: bool) -> None:
    """Compare plans with captures, a form a line."""
    quiet()
    teacher = teacher.resolve()  # before the directory changes
    texts = texts // 10 if quick else texts
    rows: dict[str, dict[str, float]] = {}
    for logits in FORMS["logits"]:
        with tempfile.TemporaryDirectory() as directory, contextlib.chdir(directory):
            rows |= compare(parameters(teacher, files, texts, logits))
    table = Table(box=None)
    for column in ("", "planned", "probed", "took", "planned / took", "probed / took"):
        table.add_column(column, justify="left" if not column else "right")
    for name, one in rows.items():
        shares = (one["planned"] / one["took"], one["probed"] / one["took"])
        counts = (f"{one[key]:,}" for key in ("planned", "probed", "took"))
        table.add_row(name, *counts, *(f"{share:.3f}" for share in shares))
    Console().print(table)
    worst = max(abs(one["probed"] / one["took"] - 1) for one in rows.values())
    figures = {"probed_bytes_off_at_most": round(worst, 4)}
    click.echo(json.dumps({"figures": figures, "rows": rows, "machine": machine()}))


if __name__ == "__main__":
    main()
