"""gc: removes stores that no manifest of this checkout names; DVC does not own them."""

import click

from pipeline.errors import ConfigError
from pipeline.store.gc import remove_store, store_bytes, unreferenced_stores
from stages.command import stage
from stages.project import DATA, stores


@click.command()
@click.option("--delete", is_flag=True, help="Delete them; without it they are only listed.")
@stage
def gc(delete: bool) -> None:
    """List the stores below data/stores that no manifest below data/manifests names.

    Manifests of other branches and of experiments are not looked at: capture rebuilds what they
    name when it is asked for.

    \b
    Example:
      decant gc
      decant gc --delete
    """
    manifests = DATA / "manifests"
    if not any(manifests.glob("*/*.json")):
        raise ConfigError(
            f"{manifests}: found no manifest, so every store would look unneeded; run "
            "`dvc repro capture` first, or delete directories of data/stores by hand"
        )
    found = unreferenced_stores(stores(), manifests)
    total = 0
    for path in found:
        size = remove_store(path) if delete else store_bytes(path)
        total += size
        click.echo(f"{path.name:<18} {size:>16,} bytes")
    done = "deleted" if delete else "not needed; --delete removes them"
    click.echo(f"{len(found)} stores, {total:,} bytes {done}")


if __name__ == "__main__":
    gc()
