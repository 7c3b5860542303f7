"""evaluate-teacher@T: what teacher T scores and costs; it alone loads the teacher again."""

from pathlib import Path

import click

from pipeline.provenance import write_json
from stages.command import params_option, stage
from stages.project import DATA, prepare_torch, runtime

BATCH_TOKENS = 8192


@click.command("evaluate-teacher")
@click.argument("teacher")
@params_option
@stage
def evaluate_teacher(teacher: str, params: Path) -> None:
    """Measure TEACHER on the validation and test splits into data/metrics/teachers/TEACHER.json.

    \b
    Example:
      decant evaluate-teacher main
    """
    import torch

    from pipeline.corpus.tokens import TokenSet
    from pipeline.evaluate.evaluate import evaluate_model
    from pipeline.teacher.load import load_teacher
    from pipeline.teacher.reference import TeacherReference

    device = torch.device(prepare_torch(runtime()))
    tokens = TokenSet.load(DATA / "corpus" / "tokens" / teacher)
    directory = DATA / "teachers" / teacher
    reference = TeacherReference.load(directory)
    model = load_teacher(
        directory, reference, task=tokens.meta.task, device=device, dtype=torch.float32
    )
    location = Path(reference.location(directory))
    metrics = evaluate_model(
        model,
        tokens,
        batch_tokens=BATCH_TOKENS,
        device=device,
        directory=location if location.is_dir() else None,
    )
    output = DATA / "metrics" / "teachers" / f"{teacher}.json"
    write_json(output, {"name": teacher, **metrics})


if __name__ == "__main__":
    evaluate_teacher()
