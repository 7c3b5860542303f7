"""How a plan is shown: tables and a few sentences, all from the values that `--json` prints."""

from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.planning.sizes import show_size

WIDEST = 1000
RIGHT = (
    "tokens",
    "B/token",
    "raw",
    "expected",
    "at most",
    "took",
    "parameters",
    "weights, gradients, moments",
)
RIGHT += ("activations", "pool (host)", "epochs")


def show(console: Console, found: dict[str, Any]) -> None:
    """Print a plan."""
    tokens = found["tokens"]
    console.print(f"[bold]plan of teacher {found['teacher']}[/]", soft_wrap=True)
    splits = ", ".join(f"{tokens['splits'][split]:,} {split}" for split in tokens["splits"])
    console.print(f"tokens: {splits} ({tokens['origin']})", soft_wrap=True)
    chosen = f"{tokens['captured']:,} tokens in {found['segments']:,} segments"
    console.print(f"captured: {chosen}; bytes are {found['bytes']}", soft_wrap=True)
    if found["training_segments"] == 1:
        console.print(
            "the training text is one segment, so a capture that is interrupted begins anew; lower "
            "capture.segment_tokens to resume within it",
            soft_wrap=True,
        )
    if found["is_batch_found"]:
        console.print(
            f"batch_tokens is auto: memory is that of batches of {found['batch_tokens']:,} tokens",
            soft_wrap=True,
        )
    console.print()
    _print_whole(console, _signals(found))
    _disk(console, found)
    console.print()
    _memory(console, found)
    _time(console, found)
    if found["budget"] is not None:
        console.print()
        _budget(console, found["budget"])


def _print_whole(console: Console, table: Table) -> None:
    # Whole lines: what is cut off is of use to nobody, least of all to a file or a pipe.
    wide = console.measure(table, options=console.options.update(width=WIDEST)).maximum
    Console(highlight=False, width=max(wide, console.width), file=console.file).print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in RIGHT else "left", no_wrap=True)
    return table


def _signals(found: dict[str, Any]) -> Table:
    has_store = found["total"]["took_bytes"] is not None
    took = ("took",) if has_store else ()
    table = _table(
        "signal", "form", "splits", "tokens", "B/token", "raw", "expected", "at most", *took
    )

    def stored(one: dict[str, Any]) -> tuple[str, ...]:
        if not has_store:
            return ()
        return ("–" if one["took_bytes"] is None else show_size(one["took_bytes"]),)

    for one in found["signals"]:
        place = one["kind"] if one["layer"] is None else f"{one['kind']}/{one['layer']}"
        table.add_row(
            place,
            one["form"],
            one["splits"],
            f"{one['tokens']:,}",
            f"{one['token_bytes']:,.1f}",
            show_size(one["raw_bytes"]),
            show_size(one["expected_bytes"]),
            show_size(one["most_bytes"]),
            *stored(one),
        )
    for name, count in found["assets"].items():
        size = show_size(count)
        table.add_row(name, "asset", "", "", "", size, size, size, *(("",) if has_store else ()))
    table.add_row(
        "tokens, examples, records", "", "", "", "", "",
        show_size(found["tables_bytes"]), show_size(found["tables_bytes"]),
        *(("",) if has_store else ()),
    )  # fmt: skip
    total = found["total"]
    table.add_row(
        "[bold]in all[/]", "", "", "", "",
        show_size(total["raw_bytes"] + sum(found["assets"].values())),
        show_size(total["expected_bytes"]), show_size(total["most_bytes"]), *stored(total),
    )  # fmt: skip
    return table


def _disk(console: Console, found: dict[str, Any]) -> None:
    disk, total = found["disk"], found["total"]
    free = f"{show_size(disk['free_bytes'])} free at {disk['path']}"
    if total["took_bytes"] is not None:
        planned = show_size(total["expected_bytes"])
        console.print(
            f"the store is whole: planned {planned}, took {show_size(total['took_bytes'])}; {free}",
            soft_wrap=True,
        )
        return
    said = "it fits" if disk["fits"] else "[bold]it does not fit[/], capture will refuse it"
    needed = show_size(disk["needed_bytes"])
    console.print(f"{free}, at most {needed} needed: {said}", soft_wrap=True)
    if not disk["fits"]:
        console.print(
            f"to compare smaller choices: decant plan {found['teacher']} --budget "
            f"{show_size(disk['free_bytes'] * 0.9).replace(' ', '')}",
            soft_wrap=True,
        )


def _memory(console: Console, found: dict[str, Any]) -> None:
    memory = found["memory"]["capture"]
    said = f"{show_size(memory['weight_bytes'])} weights ({memory['dtype']})"
    if memory["peak_bytes"] is None:
        said += f" + about {show_size(memory['activation_bytes'])} of a batch (an estimate)"
    else:
        said += (
            f"; {show_size(memory['peak_bytes'])} at its peak while probing, {memory['peak_of']}"
        )
    said += f"; {show_size(memory['buffer_bytes'])} of segments on the host"
    console.print(f"memory of the capture: {said}", soft_wrap=True)
    students = found["memory"]["students"]
    if not students:
        return
    console.print("memory of the students (all but weights, gradients and moments are estimates):")
    table = _table(
        "student", "parameters", "weights, gradients, moments", "teacher's head, features",
        "activations", "pool (host)", "epochs",
    )  # fmt: skip
    for name, one in students.items():
        if "error" in one:
            continue
        exact = one["weight_bytes"] + one["gradient_bytes"] + one["moment_bytes"]
        table.add_row(
            name,
            f"{one['parameters']:,}",
            show_size(exact + one["projector_bytes"]),
            show_size(one["teacher_bytes"]),
            show_size(one["activation_bytes"]),
            show_size(one["pool_bytes"]),
            f"{one['epochs']:g}",
        )
    _print_whole(console, table)
    for name, one in students.items():
        if "error" in one:
            console.print(f"{name}: {one['error']}", soft_wrap=True, markup=False)


def _time(console: Console, found: dict[str, Any]) -> None:
    time = found["time"]
    if time is None:
        console.print("time: unknown without --probe")
        return
    bare, captured, read = (
        _seconds(time[f"{key}_seconds"]) for key in ("forward", "capture", "read")
    )
    console.print(
        f"time on {time['device']}, told by {time['probed_tokens']:,} tokens: a token takes {bare} "
        f"of teacher alone, {captured} captured, {read} read back; the capture "
        f"{_duration(time['capture_total_seconds'])}",
        soft_wrap=True,
    )
    pays, planned = time["pays_from"], time["planned"]
    if pays is None:
        said = "never: reading back takes as long as the teacher itself"
    else:
        said = f"from {pays:.2g} epochs × students; params.yaml plans {planned:g}"
    console.print(f"the store pays {said}", soft_wrap=True)


def _budget(console: Console, budget: dict[str, Any]) -> None:
    limit = show_size(budget["budget_bytes"])
    how = "as the probe measured" if budget["is_measured"] else "as if nothing compressed"
    console.print(f"[bold]choices for a budget of {limit}[/], each one change; bytes {how}:")
    table = _table("kind", "choice", "at most", "fits", "excludes")
    excluded: dict[str, str] = {}
    for choice in budget["choices"]:
        table.add_row(
            choice["kind"],
            choice["change"],
            show_size(choice["bytes"]),
            "yes" if choice["fits"] else "no",
            ", ".join(choice["excludes"]),
        )
        for name, reason in choice["excludes"].items():
            excluded[f"{name}, {choice['kind']} {choice['change']}"] = reason
    _print_whole(console, table)
    for student, reason in excluded.items():
        console.print(f"{student}: {reason}", soft_wrap=True, markup=False)
    if not any(choice["fits"] for choice in budget["choices"]):
        console.print(
            "no single change fits: combine several, capture fewer rows (capture.fraction), or "
            "leave out a kind",
            soft_wrap=True,
        )


def _seconds(value: float) -> str:
    return f"{value * 1e6:,.3g} µs" if value < 1e-3 else f"{value * 1e3:,.3g} ms"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.3g} s"
    if seconds < 6000:
        return f"{seconds / 60:.3g} min"
    return f"{seconds / 3600:,.3g} h"
