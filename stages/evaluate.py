"""evaluate@S: what student S scores, how it agrees with its teacher, and what it costs."""

from pathlib import Path

import click

from pipeline.provenance import read_json, write_json
from stages.command import params_option, stage
from stages.parameters import section
from stages.project import DATA, prepare_torch, runtime, stores

BATCH_TOKENS = 8192


@click.command()
@click.argument("student")
@params_option
@stage
def evaluate(student: str, params: Path) -> None:
    """Measure STUDENT on the validation and test splits into data/metrics/students/STUDENT.json.

    \b
    Example:
      decant evaluate aligned
    """
    import torch

    from pipeline.corpus.tokens import TokenSet
    from pipeline.evaluate.agreement import agreement
    from pipeline.evaluate.evaluate import evaluate_model
    from pipeline.evaluate.load import load_student

    teacher = section(params, f"students.{student}.teacher", str)
    device = torch.device(prepare_torch(runtime()))
    tokens = TokenSet.load(DATA / "corpus" / "tokens" / teacher)
    directory = DATA / "students" / student
    model = load_student(directory, task=tokens.meta.task)
    metrics = evaluate_model(
        model, tokens, batch_tokens=BATCH_TOKENS, device=device, directory=directory
    )
    reference = read_json(DATA / "selected" / f"{student}.agreement.json")
    if reference is not None:
        metrics["agreement"] = agreement(
            model,
            stores() / reference["store"],
            reference["signal"],
            reference["digest"],
            batch_tokens=BATCH_TOKENS,
            device=device,
        )
    output = DATA / "metrics" / "students" / f"{student}.json"
    write_json(output, {"name": student, "teacher": teacher, **metrics})


if __name__ == "__main__":
    evaluate()
