"""evaluate-teacher@T: what teacher T scores, says and costs; after capture it alone loads it."""

from pathlib import Path

import click

from pipeline.evaluate.options import EvaluateParams
from pipeline.provenance import write_json
from stages.command import params_option, stage
from stages.parameters import section
from stages.project import DATA, prepare_torch, runtime

BATCH_TOKENS = 8192


@click.command("evaluate-teacher")
@click.argument("teacher")
@params_option
@stage
def evaluate_teacher(teacher: str, params: Path) -> None:
    """Measure TEACHER: its scores and its cost.

    On the validation and test splits. The metrics go to data/metrics/teachers/TEACHER.json, the
    prediction for each test row to data/predictions/teachers/TEACHER.jsonl.

    \b
    Example:
      decant evaluate-teacher main
    """
    options: EvaluateParams = section(params, "evaluate", EvaluateParams)
    import torch

    from pipeline.corpus.tokens.tokens import TokenSet
    from pipeline.evaluate.evaluate import evaluate_model
    from pipeline.evaluate.predictions import write_predictions
    from pipeline.teacher.source.load import load_teacher
    from pipeline.teacher.source.placement import Placement, input_device
    from pipeline.teacher.source.reference import TeacherReference

    machine = runtime()
    device = torch.device(prepare_torch(machine))
    tokens = TokenSet.load(DATA / "corpus" / "tokens" / teacher)
    directory = DATA / "teachers" / teacher
    reference = TeacherReference.load(directory)
    tokens.meta.refuse_others(str(directory), **(reference.made_of or {}))
    model = load_teacher(
        directory,
        reference,
        task=tokens.meta.task,
        device=device,
        dtype=getattr(torch, options.dtype),
        placement=Placement.of(machine),
    )
    location = Path(reference.location(directory))
    evaluation = evaluate_model(
        model,
        tokens,
        batch_tokens=BATCH_TOKENS,
        device=input_device(model, device),
        directory=location if location.is_dir() else None,
        score=options.score,
        generate=options.generate,
        intervals=options.intervals,
        tokenizer=options.tokenizer,
        is_timed=options.timing,
    )
    write_predictions(
        DATA / "predictions" / "teachers" / f"{teacher}.jsonl", evaluation.predictions
    )
    output = DATA / "metrics" / "teachers" / f"{teacher}.json"
    write_json(output, {"name": teacher, **evaluation.metrics})


if __name__ == "__main__":
    evaluate_teacher()
