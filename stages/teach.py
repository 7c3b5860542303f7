"""teach@T: the teacher is referenced, fine-tuned, or built from scratch."""

from pathlib import Path

import click

from pipeline.teacher.parameters.model import TeacherModel
from pipeline.training.options import TrainOptions
from stages.command import params_option, resumable
from stages.parameters import check_unchanged, section
from stages.project import DATA, on_one_gpu, prepare_torch, runtime, work


@click.command()
@click.argument("teacher")
@params_option
@resumable("goes on from the last checkpoint, if there is one")
def teach(teacher: str, params: Path) -> None:
    """Make TEACHER ready: reference it, or train it.

    A reference, or the weights that were trained on the corpus, go to data/teachers/TEACHER.

    \b
    Example:
      decant teach main
    """
    model = section(params, f"teachers.{teacher}.model", TeacherModel)
    fit = section(params, f"teachers.{teacher}.fit", TrainOptions | None)
    from pipeline.teacher.source.teach import teach as run

    run(
        name=teacher,
        tokens=DATA / "corpus" / "tokens" / teacher,
        output=DATA / "teachers" / teacher,
        work=work(),
        scratch=model.scratch,
        path=model.path,
        revision=model.revision,
        trust_remote_code=model.trust_remote_code,
        fit=fit,
        device=prepare_torch(on_one_gpu(runtime())),
        quantization=None if model.quantization is None else model.quantization.build(),
        before_commit=check_unchanged,
    )


if __name__ == "__main__":
    teach()
