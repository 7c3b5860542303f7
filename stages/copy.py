"""copy: a store, or some signals of it, to another disk; verified there, and resumable."""

from pathlib import Path

import click
from tqdm import tqdm

from pipeline.report.words import counted
from pipeline.store.upkeep.copy import StoreCopy
from stages.command import resumable


@click.command()
@click.argument(
    "source",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    nargs=-1,
    required=True,
)
@click.argument("target", type=click.Path(path_type=Path))
@click.option(
    "--signal",
    "signals",
    metavar="NAME",
    multiple=True,
    help="Copy only this signal, named in full or by an unambiguous prefix; may be repeated.",
)
@resumable("keeps every file that was copied")
def copy(source: tuple[Path, ...], target: Path, signals: tuple[str, ...]) -> None:
    """Copy a store and read every copied file again.

    TARGET is a directory of stores, in which the copy keeps the store's name, or it ends in that
    name and is the copy itself. If the same store is there already, signals are added to it. An
    interrupted copy is not a store to any reader; the same command resumes it. With --signal, the
    signals that it is rebuilt from are copied too.

    \b
    Example:
      decant copy data/stores/3f2a9c41d0b7e856 /mnt/big/stores
      decant copy data/stores/3f2a9c41d0b7e856 /mnt/big --signal hidden/2
    """
    for store in source:
        plan = StoreCopy(store, target, signals=signals or None)
        with tqdm(total=plan.bytes, desc="copy", unit="B", unit_scale=True) as bar:
            plan.run(bar.update)
        click.echo(
            f"{plan.root}: copied {counted(len(plan.signals), 'signal')}, "
            f"{counted(plan.copied_bytes, 'byte')}; "
            f"{counted(plan.kept, 'file')} {'was' if plan.kept == 1 else 'were'} already there"
        )


if __name__ == "__main__":
    copy()
