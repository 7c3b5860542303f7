"""code: the digests of the source files that each DVC stage runs, for DVC to depend on."""

import click

from pipeline.provenance import write_bytes_atomically
from pipeline.source_code import SourceCode
from stages.cli import STAGES, module_name
from stages.command import stage
from stages.project import DATA


@click.command()
@stage
def code() -> None:
    """List the source files that each stage runs.

    Their digests go to data/code, which DVC depends on: after an edit or an upgrade of decant,
    `dvc repro` runs exactly the stages whose files changed. A list is written only if it changes.

    \b
    Example:
      decant code
    """
    source_code = SourceCode(["pipeline", "stages"])
    for name in STAGES:
        path = DATA / "code" / f"{name}.txt"
        digests = "".join(f"{line}\n" for line in source_code.digests(module_name(name)))
        if not path.is_file() or path.read_text(encoding="utf-8") != digests:
            write_bytes_atomically(path, digests.encode())


if __name__ == "__main__":
    code()
