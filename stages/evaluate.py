"""evaluate@S: the scores of student S, its agreement with its teacher, and its cost."""

import logging
from pathlib import Path
from typing import Any

import click

from pipeline.evaluate.options import EvaluateParams
from pipeline.provenance import read_json, write_json
from stages.command import params_option, stage
from stages.parameters import section
from stages.project import DATA, prepare_torch, runtime, stores

logger = logging.getLogger(__name__)

BATCH_TOKENS = 8192
TIMING_LENGTH = 128


@click.command()
@click.argument("student")
@params_option
@stage
def evaluate(student: str, params: Path) -> None:
    """Measure STUDENT: scores, agreement and cost.

    On the validation and test splits. The metrics go to data/metrics/students/STUDENT.json, the
    prediction for each test row to data/predictions/students/STUDENT.jsonl.

    \b
    Example:
      decant evaluate aligned
    """
    teacher = section(params, f"students.{student}.teacher", str)
    options: EvaluateParams = section(params, "evaluate", EvaluateParams)
    import torch

    from pipeline.corpus.tokens.tokens import TokenSet
    from pipeline.evaluate.agreement import agreement
    from pipeline.evaluate.evaluate import evaluate_model
    from pipeline.evaluate.load import load_student
    from pipeline.evaluate.predictions import identity, read_predictions, write_predictions
    from pipeline.evaluate.vocabulary import StudentTokenSet, student_token_set
    from pipeline.store.reader import StoreReader
    from pipeline.taps.row_length import longest_row
    from pipeline.tasks import generates

    device = torch.device(prepare_torch(runtime()))
    teacher_tokens = TokenSet.load(DATA / "corpus" / "tokens" / teacher)
    directory = DATA / "students" / student
    record, also = _record(directory), _written_by(teacher, teacher_tokens.meta.digest)
    teacher_tokens.meta.refuse_others(str(directory), **record.get("made_of", {}), also=also)
    dtype = getattr(torch, options.dtype)
    model = load_student(directory, task=teacher_tokens.meta.task, dtype=dtype)
    tokens = student_token_set(teacher_tokens, directory, longest_row(model))
    selected = DATA / "selected" / f"{student}.agreement.json"
    reference = read_json(selected)
    if reference is not None and tokens is not teacher_tokens:
        logger.info("%s has a vocabulary of its own: no agreement with its teacher", student)
        reference = None
    if reference is not None:
        store = stores() / reference["store"]
        spec = StoreReader(store).plan["spec"]
        tokens.meta.refuse_others(str(store), tokens=spec.get("tokens"), also=also)
    teacher_texts = None
    if generates(tokens.meta.task):
        rows = read_predictions(DATA / "predictions" / "teachers" / f"{teacher}.jsonl")
        teacher_texts = {identity(row): row["text"] for row in rows if "text" in row}
    evaluation = evaluate_model(
        model,
        tokens,
        batch_tokens=BATCH_TOKENS,
        device=device,
        directory=directory,
        score=options.score,
        generate=options.generate,
        teacher_texts=teacher_texts,
        intervals=options.intervals,
        tokenizer=options.tokenizer,
        is_timed=options.timing,
        # The teacher's: speeds of other lengths would not compare.
        timing_length=min(TIMING_LENGTH, teacher_tokens.meta.max_length),
    )
    metrics = evaluation.metrics | {"trained_from": _trained_from(record)}
    if isinstance(tokens, StudentTokenSet) and tokens.cut_rows["test"]:
        metrics["test_cut_rows"] = tokens.cut_rows["test"]
    if reference is not None:
        metrics["agreement"] = agreement(
            model,
            stores() / reference["store"],
            reference["signal"],
            reference["digest"],
            batch_tokens=BATCH_TOKENS,
            device=device,
        )
        metrics["compared_with"] = [reference]
    write_predictions(
        DATA / "predictions" / "students" / f"{student}.jsonl", evaluation.predictions
    )
    output = DATA / "metrics" / "students" / f"{student}.json"
    write_json(output, {"name": student, "teacher": teacher, **metrics})


def _record(directory: Path) -> dict[str, Any]:
    """Return where a student comes from; a student of an earlier version says nothing of it."""
    path = directory / "distillation.json"
    return read_json(path) if path.exists() else {}


def _written_by(teacher: str, tokens: str) -> list[str]:
    """Return the digest of the rows that the teacher wrote from those of a digest, if it did."""
    directory = DATA / "corpus" / "transfer" / teacher
    record = directory / "transfer.json"
    if not record.exists() or read_json(record).get("tokens") != tokens:
        return []
    return [read_json(directory / "tokens.json")["digest"]]


def _trained_from(record: dict[str, Any]) -> list[dict[str, Any]]:
    """Return store, signal and digest of all that the student was trained from.

    As a list: DVC makes no column of the table of metrics of it.
    """
    signals = sorted(record.get("signals", {}).items())
    return [
        {"store": record["store"], "signal": name, "digest": digest} for name, digest in signals
    ]


if __name__ == "__main__":
    evaluate()
