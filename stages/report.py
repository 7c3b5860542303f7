"""report: the page, metrics.json, and the table a run ends with."""

from pathlib import Path
from typing import Any

import click
from rich.console import Console

from pipeline.provenance import read_json
from pipeline.report.compare import compare
from pipeline.report.page import write_report
from pipeline.report.results import (
    SignalResult,
    TeacherResult,
    load_corpus,
    load_student,
    load_teacher,
)
from pipeline.report.table import results_table
from pipeline.store.reader import StoreReader
from stages.command import params_option, stage
from stages.parameters import section
from stages.project import DATA, stores


@click.command()
@params_option
@stage
def report(params: Path) -> None:
    """Write data/reports/index.html and data/reports/metrics.json, and print the table.

    \b
    Example:
      decant report
    """
    teachers = section(params, "teachers", dict[str, Any])
    students = section(params, "students", dict[str, Any])
    teacher_results = [_teacher(name) for name in teachers]
    student_results = [
        load_student(
            name,
            teacher=options["teacher"],
            metrics=DATA / "metrics" / "students" / f"{name}.json",
            curve=DATA / "metrics" / "curves" / f"{name}.csv",
        )
        for name, options in students.items()
    ]
    write_report(
        output=DATA / "reports",
        teachers=teacher_results,
        students=student_results,
        corpus=load_corpus(DATA / "corpus" / "text" / "corpus.json"),
    )
    Console().print(results_table(compare(teacher_results, student_results)))
    click.echo(f"report: {(DATA / 'reports' / 'index.html').resolve()}")


def _teacher(name: str) -> TeacherResult:
    """Return a teacher with the bytes of its signals, which only the store knows."""
    result = load_teacher(
        name,
        metrics=DATA / "metrics" / "teachers" / f"{name}.json",
        tokens=DATA / "corpus" / "tokens" / name / "tokens.json",
    )
    signals, store = [], ""
    for path in sorted((DATA / "manifests" / name).glob("*.json")):
        record = read_json(path)
        store = record["store"]
        if "kind" in record:
            stored = StoreReader(stores() / store).signal(record["signal"])
            splits = stored.declaration.splits
            signals.append(SignalResult(**record, bytes=stored.bytes, splits=splits))
    return result.model_copy(update={"signals": tuple(signals), "fingerprint": store})


if __name__ == "__main__":
    report()
