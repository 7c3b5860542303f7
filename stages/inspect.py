"""inspect: the contents and origin of a store, from its records alone."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.axes import SPLITS, TRAIN
from pipeline.errors import DecantError, IntegrityError
from pipeline.report.words import counted
from pipeline.store.reader import StoreReader
from pipeline.store.records import Declaration, StoredSignal
from pipeline.store.sealed import read_record
from pipeline.store.upkeep.occupancy import bytes_by_part
from pipeline.teacher.source.reference import TeacherReference
from stages.command import stage
from stages.tables import print_whole

DIGEST_CHARACTERS = 8
RIGHT = ("tokens", "bytes", "B/token", "skipped")
SKIPPED_SHOWN = 20
MAX_SHOWN = 300
"""Longest text shown of a record, in characters."""


@click.command()
@click.argument(
    "store",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    nargs=-1,
    required=True,
)
@stage
def inspect(store: tuple[Path, ...]) -> None:
    """Show what a store holds and where it came from.

    Its signals, their forms and bytes, provenance, and skipped examples. Signals of an unfinished
    capture are shown as pending. Records that cannot be read are shown as damaged, with exit code
    3; `decant verify` reads every file.

    \b
    Example:
      decant inspect data/stores/3f2a9c41d0b7e856
    """
    for directory in store:
        _inspect(directory)


def _inspect(store: Path) -> None:
    reader = StoreReader(store)
    damaged: dict[str, str] = {}

    def attempt(read: Callable[[], Any], what: str, instead: Any) -> Any:
        try:
            return read()
        except DecantError as error:
            damaged[what] = str(error)
            return instead

    names = sorted(reader.signals, key=_natural)
    read = [attempt(lambda name=name: reader.signal(name), name, None) for name in names]
    signals: list[StoredSignal] = [signal for signal in read if signal is not None]
    examples = attempt(lambda: reader.examples, "examples", None)
    model_type = attempt(
        lambda: reader.teacher_config().get("model_type", "unknown"), "the teacher's config", "?"
    )
    pending = {}
    for path in sorted((store / "receipts").glob("*/declaration.json")):
        pending |= attempt(lambda path=path: _pending(reader, path), path.parent.name, {})
    console = Console(highlight=False)
    console.print(f"[bold]store {store.resolve().name}[/]", soft_wrap=True)
    facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    teacher = f"{model_type}{_where(store, reader)}"
    tokens = "unknown" if examples is None else f"{int(examples['length'].sum()):,}"
    for key, value in _facts(reader, signals, teacher, tokens).items():
        facts.add_row(key, _plain(value))
    facts.add_row("captured with", Text("\n").join(map(_plain, _software(signals))))
    console.print(facts)
    console.print()
    print_whole(console, _signals(signals))
    for name, count in pending.items():
        console.print(f"pending: {name}, {count}; run the capture stage again", soft_wrap=True)
    for what, error in damaged.items():
        console.print(f"damaged: {what}: {error}", soft_wrap=True, markup=False)
    skipped = [] if examples is None else _skipped(reader, signals)
    if skipped:
        console.print()
        print_whole(console, _skipped_table(reader, skipped))
        console.print(
            f"skipped {counted(len(skipped), 'training example')}, where a signal is not finite; "
            "students that use the signal do not train on them",
            soft_wrap=True,
        )
    if damaged:
        raise IntegrityError(
            f"{store}: damaged: {', '.join(damaged)}; run `decant verify {store}`, which says what "
            "to do"
        )


def _facts(
    reader: StoreReader, signals: list[StoredSignal], teacher: str, tokens: str
) -> dict[str, str]:
    plan, spec = reader.plan, reader.plan["spec"]
    sizes = bytes_by_part(reader.layout.root)
    segments = Counter(plan["segments"])
    total = sum(signal.bytes for signal in signals)
    # Training rows have all signals, other rows only logits, so this is not total bytes by tokens.
    for_each = sum(signal.bytes / signal.tokens for signal in signals if signal.tokens)
    cut, weights = spec.get("segments", {}), spec.get("teacher", {})
    fraction = cut.get("fraction", 1)
    share = "all training rows" if fraction == 1 else f"{fraction:.4g} of the training rows"
    if cut.get("limit") is not None:
        share += f", at most {cut['limit']:,}"
    return {
        "task": plan["task"],
        "examples": f"{plan['examples']:,}",
        "tokens": tokens,
        "segments": f"{', '.join(f'{segments[name]} {name}' for name in SPLITS if segments[name])}"
        f"; of {plan['segment_tokens']:,} tokens",
        **_parts(reader),
        "features": f"{total:,} bytes; {for_each:,.1f} bytes for a token with all signals",
        "teacher": f"{teacher}, weights {_short(weights.get('weights_sha256'))}, "
        f"configuration {_short(weights.get('config'))}{_packed(weights)}",
        "corpus": f"tokens {_short(spec.get('tokens'))}, tokenizer {_short(spec.get('tokenizer'))}",
        "chosen": f"{share}, seed {cut.get('seed', 'unknown')}",
        "computed in": f"{cut.get('dtype', 'unknown')}, batches of up to "
        f"{plan.get('batch_tokens') or cut.get('batch_tokens', 0):,} tokens"
        f"{', found by auto' if plan.get('batch_tokens') else ''}",
        "on disk": ", ".join(f"{name} {size:,}" for name, size in sizes.items())
        + f"; {sum(sizes.values()):,} bytes in all",
        "format": f"{spec.get('format', 'unknown')}",
    }


def _packed(weights: dict[str, Any]) -> str:
    """Describe the quantisation of the teacher's weights, if they were quantised."""
    packing = weights.get("quantization")
    return f", in {packing['bits']} bits by {packing['method']}" if packing else ""


def _parts(reader: StoreReader) -> dict[str, str]:
    """Describe the parts that were added to the corpus, if any."""
    if len(reader.parts) < 2:
        return {}
    rows = reader.plan["spec"].get("parts", [])
    descriptions = [
        counted(number, "segment") + (f" of {counted(count, 'row')}" if count else "")
        for number, count in zip_longest(reader.parts, rows[: len(reader.parts)])
    ]
    return {"parts": f"{descriptions[0]}; added {', '.join(descriptions[1:])}"}


def _where(store: Path, reader: StoreReader) -> str:
    """Name the model of the weights, if the project around the store has its reference."""
    weights = reader.plan["spec"].get("teacher", {})
    revision = weights.get("revision")
    for path in sorted((store.resolve().parent.parent / "teachers").glob("*/teacher.json")):
        try:
            reference = TeacherReference.load(path.parent)
        except IntegrityError:
            continue
        if weights and reference.identity() == weights:
            revision = reference.revision
            model = f"trained as {path.parent.name}" if reference.trained else reference.model
            return f" ({model}{f' at {revision}' if revision else ''})"
    return f" (revision {revision})" if revision else ""


def _signals(signals: list[StoredSignal]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for column in ("signal", "form", "splits", *RIGHT, "digest"):
        table.add_column(column, justify="right" if column in RIGHT else "left", no_wrap=True)
    forms = Counter(signal.declaration.name.split("-")[0] for signal in signals)
    for signal in signals:
        declared = signal.declaration
        place, identity = declared.name.rsplit("/", 1)
        is_plain = forms[declared.name.split("-")[0]] == 1
        table.add_row(
            place,
            # The hash of the options is shown only where two signals differ in nothing else.
            declared.form.name if is_plain else identity,
            "all" if len(declared.splits) == len(SPLITS) else ",".join(declared.splits),
            f"{signal.tokens:,}",
            f"{signal.bytes:,}",
            f"{signal.bytes / signal.tokens:,.1f}" if signal.tokens else "–",
            str(sum(len(receipt.skipped) for receipt in signal.receipts.values())),
            _short(signal.digest),
        )
    return table


def _pending(reader: StoreReader, path: Path) -> dict[str, str]:
    """Return the progress of a declared signal that is not complete."""
    declared = Declaration.from_json(read_record(path, reader.layout.root))
    if declared.name in reader.index["signals"]:
        return {}
    receipts = len(list(path.parent.glob("[0-9]*.json")))
    segments = sum(len(reader.segments(split)) for split in declared.splits)
    return {declared.name: f"{receipts} of {segments} segments have a receipt"}


def _skipped(reader: StoreReader, signals: list[StoredSignal]) -> list[tuple[int, Sequence[str]]]:
    """Return each training example that has a non-finite signal, and the names of such signals."""
    train = set(reader.segments(TRAIN))
    found: dict[int, list[str]] = defaultdict(list)
    for signal in signals:
        for number in sorted(train & signal.receipts.keys()):
            members = reader.examples_in(number)
            slots = reader.examples["slot"][members]
            for example in members[np.isin(slots, signal.receipts[number].skipped)].tolist():
                found[example].append(signal.declaration.name.rsplit("-", 1)[0])
    return sorted(found.items())


def _skipped_table(reader: StoreReader, skipped: list[tuple[int, Sequence[str]]]) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for column in ("not trained on", "row", "source row", "signals"):
        table.add_column(column, justify="right" if "row" in column else "left")
    examples = reader.examples
    for example, names in skipped[:SKIPPED_SHOWN]:
        numbers = (examples[key][example] for key in ("row", "source_row"))
        table.add_row(TRAIN, *(f"{number:,}" for number in numbers), ", ".join(names))
    if len(skipped) > SKIPPED_SHOWN:
        table.add_row(f"and {len(skipped) - SKIPPED_SHOWN:,} more")
    return table


def _software(signals: Sequence[StoredSignal]) -> list[str]:
    """Return the versions that wrote the signals' manifests, the most frequent first."""
    counts = Counter(
        ", ".join(f"{key} {version}" for key, version in signal.software.items())
        for signal in signals
    )
    return [versions for versions, _ in counts.most_common() if versions] or ["unknown"]


def _plain(text: str) -> Text:
    """Return text of a record without markup and without control characters for a terminal."""
    return Text("".join(letter if letter.isprintable() else "?" for letter in text[:MAX_SHOWN]))


def _short(digest: Any) -> str:
    return str(digest or "unknown")[:DIGEST_CHARACTERS]


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key with which layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split("/")]


if __name__ == "__main__":
    inspect()
