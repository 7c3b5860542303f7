"""gc: removes stores and signals that no revision of the project needs; DVC does not own them."""

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from pipeline.errors import ConfigError, ResourceError
from pipeline.report.words import counted
from pipeline.store.upkeep.revisions import Named, named_signals
from pipeline.store.upkeep.unneeded import unneeded
from stages.command import stage
from stages.project import DATA, shared_root, stores

SHOWN = 3


@click.command()
@click.option("--yes", is_flag=True, help="Remove what is listed.")
@click.option(
    "--even-unknown",
    is_flag=True,
    help="With --yes: remove even if some revisions keep no manifests in git.",
)
@stage
def gc(yes: bool, even_unknown: bool) -> None:
    """List or remove stores that no revision needs.

    A store, or a signal of one, is needed if a manifest below data/manifests names it: of any
    branch, local or remote, tag, stash, experiment (queued ones too) or worktree, or of the files
    as they are now. What a running capture holds is kept. `decant capture` brings back what was
    removed by mistake.

    \b
    Example:
      decant gc
      decant gc --yes
    """
    named = named_signals([Path.cwd(), shared_root()])
    if not named.signals:
        raise ConfigError(
            f"{DATA / 'manifests'}: found no manifest, so every store would look unneeded; run "
            "`dvc repro capture` first, or delete directories of data/stores by hand"
        )
    if yes and named.silent and not even_unknown:
        raise ConfigError(
            f"{_silent(named)}; commit data/manifests there, or give --even-unknown: what is "
            "needed there is then captured again when it is used"
        )
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for column in ("store", "signal", "bytes", "reason"):
        table.add_column(column, justify="right" if column == "bytes" else "left", no_wrap=True)
    counts = {"store": 0, "signal": 0, "byte": 0}
    for found in unneeded(stores(), named.signals):
        size, reason, is_kept = found.bytes, found.reason, found.holder is not None
        if yes and not is_kept:
            try:
                size = found.remove()
            except ResourceError as error:
                is_kept, reason = True, str(error)
        if found.holder is not None:
            reason = f"kept: {found.holder} is writing the store"
        table.add_row(found.store.name, found.name or "all of it", f"{size:,}", reason)
        if not is_kept:
            counts["store" if found.name is None else "signal"] += 1
            counts["byte"] += size
    console = Console(highlight=False)
    if table.row_count:
        console.print(table, soft_wrap=True)
    done = "removed" if yes else "not needed; --yes removes them"
    totals = ", ".join(counted(count, noun) for noun, count in counts.items())
    click.echo(f"{totals} {done}")
    click.echo(_asked(named))


def _asked(named: Named) -> str:
    if not named.in_git:
        return "not in git: searched only the files as they are now"
    searched = f"searched {counted(named.revisions, 'revision')} and the files as they are now"
    return f"{searched}; {_silent(named)}" if named.silent else searched


def _silent(named: Named) -> str:
    shown = ", ".join(named.silent[:SHOWN]) + (", …" if len(named.silent) > SHOWN else "")
    verb = "has" if len(named.silent) == 1 else "have"
    return (
        f"{counted(len(named.silent), 'revision')} {verb} a capture stage but no manifests in git, "
        f"so what is needed there is unknown ({shown})"
    )


if __name__ == "__main__":
    gc()
