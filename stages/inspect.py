"""inspect: what a store holds, from its records alone."""

from collections import Counter
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from pipeline.axes import SPLITS
from pipeline.provenance import read_json
from pipeline.store.reader import StoredSignal, StoreReader
from stages.command import stage

DIGEST_CHARACTERS = 8
RIGHT = ("tokens", "bytes", "B/token", "skipped")


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
    signals = [reader.signal(name) for name in sorted(reader.signals, key=_natural)]
    console = Console(highlight=False)
    console.print(f"[bold]store {store.resolve().name}[/]", soft_wrap=True)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for key, value in _facts(reader, signals).items():
        facts.add_row(key, value)
    console.print(facts)
    console.print()
    console.print(_signals(signals))


def _facts(reader: StoreReader, signals: list[StoredSignal]) -> dict[str, str]:
    plan, spec = reader.plan, reader.plan["spec"]
    segments = Counter(plan["segments"])
    model_type = reader.teacher_config().get("model_type", "unknown")
    total = sum(signal.bytes for signal in signals)
    # Hidden states and attention are kept for training alone, logits for all: no plain quotient.
    for_each = sum(signal.bytes / signal.tokens for signal in signals if signal.tokens)
    return {
        "task": plan["task"],
        "examples": f"{plan['examples']:,}",
        "tokens": f"{int(reader.examples['length'].sum()):,}",
        "segments": f"{', '.join(f'{segments[name]} {name}' for name in SPLITS if segments[name])}"
        f"; of {plan['segment_tokens']:,} tokens",
        "features": f"{total:,} bytes; {for_each:,.1f} bytes for a token with all signals",
        "teacher": f"{model_type}, weights {_short(spec['teacher']['weights_sha256'])}",
        "corpus": f"tokens {_short(spec['tokens'])}, tokenizer {_short(spec['tokenizer'])}",
        "computed in": f"{spec['segments']['dtype']}, batches of up to "
        f"{spec['segments']['batch_tokens']:,} tokens",
        "assets": ", ".join(sorted(reader.index["assets"])) or "none beside the tokenizer",
        "captured with": "\n".join(_software(reader)) or "unknown",
    }


def _signals(signals: list[StoredSignal]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for column in ("signal", "form", "splits", *RIGHT, "digest"):
        table.add_column(column, justify="right" if column in RIGHT else "left", no_wrap=True)
    forms = Counter(signal.declaration.signal.split("-")[0] for signal in signals)
    for signal in signals:
        declared = signal.declaration
        place, identity = declared.signal.rsplit("/", 1)
        is_plain = forms[declared.signal.split("-")[0]] == 1
        table.add_row(
            place,
            # The hash of options only where two captures differ in nothing else.
            declared.form if is_plain else identity,
            "all" if len(declared.splits) == len(SPLITS) else ",".join(declared.splits),
            f"{signal.tokens:,}",
            f"{signal.bytes:,}",
            f"{signal.bytes / signal.tokens:,.1f}" if signal.tokens else "–",
            str(sum(len(receipt.skipped) for receipt in signal.receipts.values())),
            _short(signal.digest),
        )
    return table


def _software(reader: StoreReader) -> list[str]:
    """Return the versions that wrote the signals' manifests, the most frequent first."""
    found = Counter(
        ", ".join(f"{key} {version}" for key, version in manifest.get("software", {}).items())
        for manifest in (read_json(reader.layout.manifest(name)) for name in reader.signals)
    )
    return [versions for versions, _ in found.most_common() if versions]


def _short(digest: str) -> str:
    return digest[:DIGEST_CHARACTERS]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key with which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split("/")]


if __name__ == "__main__":
    inspect()
