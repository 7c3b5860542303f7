"""verify: is a store intact, is it of this corpus, and does it agree with its teacher?"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pipeline.axes import SPLITS
from pipeline.errors import ConfigError, DecantError, IncompatibleError, IntegrityError
from pipeline.report.words import counted
from pipeline.store.layout import Layout
from pipeline.store.lock import writer_lock
from pipeline.store.reader import StoreReader
from pipeline.store.upkeep.findings import ASSETS, INDEX, PLAN, SignalState
from pipeline.store.upkeep.gc import store_bytes
from pipeline.store.upkeep.repair import repair as repair_store
from pipeline.store.upkeep.verify import damage_of, unrecorded_files, verify_store
from pipeline.teacher.source.reference import TeacherReference, teacher_at_hand
from pipeline.visible import visible
from stages.command import stage
from stages.project import DATA, prepare_torch, runtime, stores, teacher_of
from stages.tables import print_whole

SHOWN = 20
"""Number of damaged files to name."""
RIGHT = ("segments", "files", "bytes")
SHARED = (INDEX, PLAN, ASSETS)


@click.command()
@click.argument("store", type=click.Path(path_type=Path), nargs=-1, required=True)
@click.option("--deep", is_flag=True, help="Decode every shard; re-run the teacher on a sample.")
@click.option(
    "--against",
    "corpus",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="Compare the rows with those of a token set, data/corpus/tokens/T.",
)
@click.option(
    "--teacher",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="With --deep: the teacher's directory, if it is not below data/teachers.",
)
@click.option("--repair", is_flag=True, help="Remove what is damaged, so that capture redoes it.")
@stage
def verify(
    store: tuple[Path, ...], deep: bool, corpus: Path | None, teacher: Path | None, repair: bool
) -> None:
    """Check every record and every file of a store.

    STORE is a directory, or a name below data/stores. Exit codes: 0 if all that readers see is
    intact, 3 if something is damaged or there is no index yet, 4 if the rows are those of another
    corpus or the values those of another teacher, 5 if --repair finds another process writing.

    \b
    Example:
      decant verify data/stores/3f2a9c41d0b7e856
      decant verify 3f2a9c41d0b7e856 --deep --against data/corpus/tokens/main
      decant verify 3f2a9c41d0b7e856 --repair && decant capture main
    """
    if teacher is not None and not deep:
        raise ConfigError("--teacher: says nothing without --deep; add it, or leave both out")
    errors: list[DecantError] = []
    for one in store:
        try:
            _verify(one, deep=deep, corpus=corpus, teacher=teacher, repair=repair)
        except DecantError as error:
            errors.append(error)
    for error in errors[:-1]:
        click.echo(f"error: {visible(str(error))}", err=True)
    if errors:
        raise errors[-1]


def _verify(
    store: Path, *, deep: bool, corpus: Path | None, teacher: Path | None, repair: bool
) -> None:
    path = _directory(store)
    console = Console(highlight=False)
    # Held from the search to the removal: nobody may write in between.
    lock = writer_lock(Layout(path).lock, wait=False) if repair else contextlib.nullcontext()
    with lock:
        with _progress(path) as bar:
            states = verify_store(path, deep=deep, progress=bar.update)
        damaged = damage_of(states)
        answers = _ask_teacher(path, teacher, states) if deep and not damaged else {}
        _show(console, path, states, answers if deep else None)
        if damaged and repair:
            _repair(path, states)
            return
    if damaged:
        what = ", ".join(state.name for state in states if state.is_damaged)
        raise IntegrityError(
            f"{path}: {counted(len(damaged), 'damaged file')} in {what}; first {damaged[0].file} "
            f"({damaged[0].reason}): run `decant verify {store} --repair`, then "
            f"`decant capture {teacher_of(path.resolve().name)}`"
        )
    if not Layout(path).index.exists():
        raise IntegrityError(
            f"{path}: has no index yet, so readers see no store; run `decant capture "
            f"{teacher_of(path.resolve().name)}`, or repeat the `decant copy` that was interrupted"
        )
    if corpus is not None:
        _compare(console, path, corpus)
    if beyond := [name for name, words in answers.items() if words.startswith("differs")]:
        raise IncompatibleError(
            f"{path}: {', '.join(beyond)}: other values than the teacher's, beyond the stated "
            "error; remove the store and capture it again"
        )


def _directory(store: Path) -> Path:
    for path in (store, stores() / store):
        if path.is_dir():
            return path
    raise ConfigError(
        f"{store}: no such store; expected a directory, or the name of one below {stores()}"
    )


@contextlib.contextmanager
def _progress(path: Path) -> Iterator[tqdm]:
    """Show a progress bar of the bytes read on stderr."""
    total = store_bytes(path)
    with tqdm(total=total, desc="verify", unit="B", unit_scale=True, leave=False) as bar:
        yield bar


def _show(
    console: Console, path: Path, states: list[SignalState], answers: Mapping[str, str] | None
) -> None:
    table = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    columns = ["signal", "form", "splits", *RIGHT, "state"]
    for column in columns if answers is None else [*columns, "teacher"]:
        table.add_column(column, justify="right" if column in RIGHT else "left", no_wrap=True)
    for state in states:
        is_shared = state.name in SHARED
        place, _, form = ("", "", "") if is_shared else state.name.rpartition("/")
        row = [
            place or state.name,
            form,
            "all" if len(state.splits) == len(SPLITS) else ",".join(state.splits),
            "" if is_shared else f"{state.whole}/{state.segments}",
            f"{len(state.files):,}",
            f"{state.bytes:,}",
            state.state,
        ]
        if answers is not None:
            row.append("" if is_shared else answers.get(state.name, "not asked"))
        table.add_row(*row)
    console.print(f"[bold]store {path.resolve().name}[/]", soft_wrap=True)
    print_whole(console, table)
    damaged = damage_of(states)
    for damage in damaged[:SHOWN]:
        of_segment = "" if damage.segment is None else f" (segment {damage.segment})"
        line = f"{damage.file}{of_segment}: {damage.reason}"
        # A file of a foreign store may have a name with control characters for a terminal.
        line = "".join(letter if letter.isprintable() else "?" for letter in line)
        console.print(line, soft_wrap=True, markup=False)
    if len(damaged) > SHOWN:
        console.print(f"and {len(damaged) - SHOWN} more")
    if strays := unrecorded_files(path, states):
        console.print(
            f"{counted(len(strays), 'file')} in no record: an unfinished capture, or leftovers"
        )


def _ask_teacher(path: Path, given: Path | None, states: list[SignalState]) -> dict[str, str]:
    """Return, by signal, in words whether the teacher agrees with a sample of it."""
    names = [s.name for s in states if s.name not in SHARED and s.is_indexed]
    if not names:
        return {}
    reader = StoreReader(path)
    directory = given or teacher_at_hand(DATA / "teachers", reader.plan["spec"])
    if directory is None:
        return dict.fromkeys(names, "teacher not at hand")
    import torch

    from pipeline.teacher.capture.spot_check import spot_check
    from pipeline.teacher.source.placement import Placement

    machine = runtime()
    device = torch.device(prepare_torch(machine))
    placement = Placement.of(machine)
    try:
        checks = spot_check(reader, directory, names, device=device, placement=placement)
    except ConfigError:
        if given is not None or Path(TeacherReference.load(directory).location(directory)).is_dir():
            raise
        return dict.fromkeys(names, "teacher not at hand")
    answers = dict.fromkeys(names, "nothing stored")
    for check in checks:
        words = "agrees" if check.is_within else "differs"
        where = "" if check.is_within else f" in segment {check.segment}"
        answers[check.signal] = f"{words}{where}: {check.share:.2g} of its error"
    return answers


def _repair(path: Path, states: list[SignalState]) -> None:
    for line in repair_store(path, states):
        click.echo(line, err=True)
    if all(damage.is_stray or damage.content is not None for damage in damage_of(states)):
        click.echo(f"store {path.resolve().name} is complete again", err=True)
        return
    name = path.resolve().name
    click.echo(
        f"store {name} is repaired: run `decant capture {teacher_of(name)}` to redo what was "
        "removed, or copy it again from its source",
        err=True,
    )


def _compare(console: Console, path: Path, corpus: Path) -> None:
    from pipeline.corpus.tokens.tokens import TokenSet
    from pipeline.teacher.capture.same_rows import compare_rows

    rows = compare_rows(StoreReader(path), TokenSet.load(corpus))
    counts = {
        "equal": rows.equal,
        "moved": rows.moved,
        "altered": rows.altered,
        "missing": rows.missing,
        "added": rows.added,
    }
    summary = ", ".join(f"{count:,} {kind}" for kind, count in counts.items() if count)
    console.print(f"rows against {corpus}: {summary or 'none'}", soft_wrap=True, markup=False)
    for line in rows.lines:
        console.print(f"  {line}", soft_wrap=True, markup=False)
    if not rows.is_same:
        raise IncompatibleError(
            f"{path}: rows of another corpus than {corpus} ({summary}; {rows.lines[0]}); run "
            f"`decant capture {teacher_of(path.resolve().name)}`, which makes a store for it"
        )


if __name__ == "__main__":
    verify()
