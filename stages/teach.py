"""teach@T: the teacher is referenced, fine-tuned, or built from scratch."""

from pathlib import Path
from typing import Any, Self

import click
from pydantic import model_validator

from pipeline.training.options import TrainOptions
from stages.command import params_option, stage
from stages.project import DATA, Section, prepare_torch, runtime, section, work


class TeacherModel(Section):
    """Section `teachers.T.model`: a directory or hub id (`path`), or a new model (`scratch`)."""

    path: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False
    scratch: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.scratch is None):
            raise ValueError("expected exactly one of path and scratch")
        if self.scratch is not None and "model_type" not in self.scratch:
            raise ValueError("scratch needs model_type, for example llama")
        if self.trust_remote_code and self.revision is None:
            raise ValueError("trust_remote_code needs a pinned revision")
        return self


@click.command()
@click.argument("teacher")
@params_option
@stage
def teach(teacher: str, params: Path) -> None:
    """Make TEACHER ready in data/teachers/TEACHER: a reference, or weights trained on the corpus.

    \b
    Example:
      decant teach main
    """
    from pipeline.teacher.teach import teach as run

    model = section(params, f"teachers.{teacher}.model", TeacherModel)
    fit = section(params, f"teachers.{teacher}.fit", TrainOptions | None)
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
        device=prepare_torch(runtime()),
    )


if __name__ == "__main__":
    teach()
