"""generate@T: the text that students are taught on is the corpus's, or teacher T's own."""

from pathlib import Path

import click

from pipeline.corpus.tokens.transfer import keep_corpus
from pipeline.teacher.parameters.tokens import TokenParams
from stages.command import params_option, resumable
from stages.parameters import check_unchanged, section
from stages.project import DATA, prepare_torch, runtime, work


@click.command()
@click.argument("teacher")
@params_option
@resumable("keeps every finished batch")
def generate(teacher: str, params: Path) -> None:
    """Let TEACHER write training targets for students.

    Only with `targets: teacher`. They go to data/corpus/transfer/TEACHER; with the corpus's own
    targets, only a note does, and the teacher is not loaded.

    \b
    Example:
      decant generate main
    """
    options = section(params, f"teachers.{teacher}.tokens", TokenParams)
    output = DATA / "corpus" / "transfer" / teacher
    if options.targets == "corpus":
        keep_corpus(output)
        return
    from pipeline.generation.options import GenerationOptions
    from pipeline.teacher.source.generate import generate as run
    from pipeline.teacher.source.placement import Placement

    machine = runtime()
    run(
        name=teacher,
        tokens=DATA / "corpus" / "tokens" / teacher,
        teacher=DATA / "teachers" / teacher,
        output=output,
        work=work(),
        options=options.generation or GenerationOptions(),
        device=prepare_torch(machine),
        placement=Placement.of(machine),
        before_commit=check_unchanged,
    )


if __name__ == "__main__":
    generate()
