"""copy: a store, or some signals of it, to another disk; verified there, and resumable."""

from pathlib import Path

import click
from tqdm import tqdm

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
    help="Only this signal, by its name or a beginning that fits one alone; may be repeated.",
)
@resumable("keeps every file that was copied")
def copy(source: tuple[Path, ...], target: Path, signals: tuple[str, ...]) -> None:
    """Copy the store SOURCE to TARGET, reading every file again at the other end.

    TARGET is a directory of stores, in which the copy keeps the store's name, or it ends in that
    name and is the copy itself. Where the same store is there already, signals are added to it. A
    copy that was cut short is no store to any reader; the same command goes on where it was. With
    --signal, what the signal is rebuilt from comes along.

    \b
    Example:
      decant copy data/stores/3f2a9c41d0b7e856 /mnt/big/stores
      decant copy data/stores/3f2a9c41d0b7e856 /mnt/big --signal hidden/2
    """
    for one in source:
        plan = StoreCopy(one, target, signals=signals or None)
        with tqdm(total=plan.bytes, desc="copy", unit="B", unit_scale=True) as bar:
            plan.run(bar.update)
        click.echo(
            f"{plan.root}: copied {len(plan.signals)} signals, {plan.copied_bytes:,} bytes; "
            f"{plan.kept:,} files were there"
        )


if __name__ == "__main__":
    copy()
