"""report: the page, metrics.json, and the table at the end of a run."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from pipeline.corpus.text.examples import read_split
from pipeline.errors import ConfigError, IncompatibleError, IntegrityError
from pipeline.evaluate.options import EvaluateParams
from pipeline.evaluate.predictions import read_predictions
from pipeline.evaluate.significance import compare_predictions
from pipeline.provenance import read_json
from pipeline.report.compare import Comparison, compare
from pipeline.report.page import write_report
from pipeline.report.pairs import PairedTest, pairs_of
from pipeline.report.results import (
    CorpusSummary,
    SignalResult,
    TeacherResult,
    load_corpus,
    load_signal,
    load_student,
    load_teacher,
)
from pipeline.report.samples import Prediction, Sample, disagreements, generated_samples
from pipeline.report.table import results_table
from pipeline.store.reader import StoreReader
from pipeline.tasks import generates
from pipeline.written_by import remedy
from stages.command import params_option, stage
from stages.parameters import section
from stages.project import DATA, stores

logger = logging.getLogger(__name__)

STORE = "store.json"
"""The record of a teacher's store, which capture writes next to a file for each signal."""


@click.command()
@params_option
@stage
def report(params: Path) -> None:
    """Write the report and print its table.

    The page goes to data/reports/index.html, its numbers to data/reports/metrics.json.

    \b
    Example:
      decant report
    """
    teachers = section(params, "teachers", dict[str, Any])
    students = section(params, "students", dict[str, Any])
    evaluation = section(params, "evaluate", EvaluateParams)
    _check_evaluated({"teachers": teachers, "students": students})
    teacher_results = [_teacher(name) for name in teachers]
    student_results = [
        load_student(
            name,
            teacher=options["teacher"],
            metrics=DATA / "metrics" / "students" / f"{name}.json",
            curve=DATA / "metrics" / "curves" / f"{name}.csv",
            section=options,
        )
        for name, options in students.items()
    ]
    corpus = load_corpus(DATA / "corpus" / "text" / "corpus.json")
    comparison = compare(teacher_results, student_results)
    answers = {
        kind: _predictions(kind, names)
        for kind, names in (("teachers", teachers), ("students", students))
    }
    write_report(
        output=DATA / "reports",
        teachers=teacher_results,
        students=student_results,
        corpus=corpus,
        pairs=_pairs(comparison, answers["students"], corpus, evaluation),
        samples=_samples(comparison, answers, corpus, evaluation.samples),
        confidence=evaluation.intervals.confidence,
    )
    console = Console()
    console.print(results_table(comparison, width=console.width))
    click.echo(f"report: {(DATA / 'reports' / 'index.html').resolve()}")


def _check_evaluated(names: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that all models have been evaluated.

    Raises:
        IntegrityError: With every model that has no metrics.
    """
    paths = [
        DATA / "metrics" / kind / f"{name}.json" for kind, known in names.items() for name in known
    ]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        commands = ", ".join(remedy(path).removeprefix("run ") for path in missing)
        raise IntegrityError(f"{', '.join(map(str, missing))}: missing; run {commands}")


def _teacher(name: str) -> TeacherResult:
    """Return a teacher's results with the bytes of its signals, which only the store knows."""
    transfer = DATA / "corpus" / "transfer" / name / "transfer.json"
    result = load_teacher(
        name,
        metrics=DATA / "metrics" / "teachers" / f"{name}.json",
        tokens=DATA / "corpus" / "tokens" / name / "tokens.json",
        transfer=transfer if transfer.exists() else None,
    )
    signals: list[SignalResult] = []
    store = ""
    for path in sorted((DATA / "manifests" / name).glob("*.json")):
        if path.name == STORE:
            store = str(read_json(path).get("store", ""))
            continue
        signal = load_signal(path)
        stored = StoreReader(stores() / signal.store).signal(signal.signal)
        known = {"bytes": stored.bytes, "splits": stored.declaration.splits}
        signals.append(signal.model_copy(update=known))
    return result.model_copy(update={"signals": tuple(signals), "fingerprint": store})


def _predictions(kind: str, names: Mapping[str, Any]) -> dict[str, list[Prediction]]:
    """Return predictions for the test rows by model; a model without a file is left out."""
    paths = {name: DATA / "predictions" / kind / f"{name}.jsonl" for name in names}
    return {name: read_predictions(path) for name, path in paths.items() if path.exists()}


def _pairs(
    comparison: Comparison,
    answers: Mapping[str, list[Prediction]],
    corpus: CorpusSummary,
    evaluation: EvaluateParams,
) -> list[PairedTest]:
    """Test pairs of students that both have predictions on the headline score."""
    tests = []
    for first, second in pairs_of(comparison):
        if first not in answers or second not in answers:
            continue
        try:
            result = compare_predictions(
                answers[first],
                answers[second],
                comparison.task,
                comparison.headline.key,
                evaluation.intervals.resamples,
                evaluation.intervals.seed,
                confidence=evaluation.intervals.confidence,
                tokenizer=evaluation.tokenizer,
                classes=len(corpus.classes) or None,
            )
        except (ConfigError, IncompatibleError) as error:
            logger.warning("%s and %s are not compared: %s", first, second, error)
            continue
        tests.append(PairedTest(first=first, second=second, **asdict(result)))
    return tests


def _samples(
    comparison: Comparison,
    answers: Mapping[str, Mapping[str, list[Prediction]]],
    corpus: CorpusSummary,
    count: int,
) -> list[Sample]:
    """Return sample rows of each teacher and its students, to read side by side."""
    samples: list[Sample] = []
    for name in (row.name for row in comparison.rows if row.is_teacher):
        teachers_rows = answers["teachers"].get(name)
        students = {
            row.name: answers["students"][row.name]
            for row in comparison.students
            if row.teacher == name and row.name in answers["students"]
        }
        if generates(comparison.task):
            samples += generated_samples(name, teachers_rows, students, count=count)
        elif comparison.task == "classification" and count:
            samples += disagreements(
                name,
                teachers_rows,
                students,
                texts=_texts(),
                classes=corpus.classes,
                count=count,
            )
    return samples


def _texts() -> dict[int, tuple[str, ...]]:
    """Return the test split's texts by source row."""
    path = DATA / "corpus" / "text"
    if not (path / "test").is_dir():
        return {}
    rows = read_split(path, "test")
    return {
        row: (text,) if pair is None else (text, pair)
        for row, text, pair in zip(rows["source_row"], rows["text"], rows["pair"], strict=True)
    }


if __name__ == "__main__":
    report()
