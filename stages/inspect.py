"""inspect: what a store holds, from its manifests alone."""

from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from pipeline.store.reader import StoreReader
from stages.command import stage


@click.command()
@click.argument("store", type=click.Path(path_type=Path, exists=True, file_okay=False))
@stage
def inspect(store: Path) -> None:
    """Show signals, forms, bytes, bytes a token, fingerprints and provenance of STORE.

    \b
    Example:
      decant inspect data/stores/3f2a9c41d0b7e856
    """
    reader = StoreReader(store)
    plan = reader.plan
    console = Console()
    splits = {name: plan["segments"].count(name) for name in dict.fromkeys(plan["segments"])}
    console.print(f"[bold]store[/] {store.resolve().name}")
    for key, value in {
        "task": plan["task"],
        "examples": plan["examples"],
        "tokens": int(reader.examples["length"].sum()),
        "segments": ", ".join(f"{count} {name}" for name, count in splits.items())
        + f", of {plan['segment_tokens']} tokens",
        "teacher weights": plan["spec"]["teacher"]["weights_sha256"][:16],
        "tokenizer": plan["spec"]["tokenizer"][:16],
        "corpus": plan["spec"]["tokens"][:16],
        "assets": ", ".join(reader.index["assets"]) or "none",
    }.items():
        console.print(f"  {key:16} {value}")
    table = Table(box=None, header_style="bold")
    for column in ("signal", "splits", "tokens", "bytes", "bytes/token", "skipped", "digest"):
        table.add_column(
            column,
            justify="right" if column in {"tokens", "bytes", "bytes/token", "skipped"} else "left",
            no_wrap=True,
        )
    for name in reader.signals:
        signal = reader.signal(name)
        skipped = sum(len(receipt.skipped) for receipt in signal.receipts.values())
        table.add_row(
            name,
            ", ".join(signal.declaration.splits),
            f"{signal.tokens:,}",
            f"{signal.bytes:,}",
            f"{signal.bytes / signal.tokens:.1f}",
            str(skipped),
            signal.digest[:16],
        )
    console.print(table)


if __name__ == "__main__":
    inspect()
