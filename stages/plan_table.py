"""Prints the estimate of a capture as tables and sentences, from the values of `--json`."""

from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.planning.sizes import show_size
from stages.tables import print_whole

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


def show(console: Console, estimate: dict[str, Any]) -> None:
    """Print an estimate."""
    tokens = estimate["tokens"]
    console.print(f"[bold]estimate for teacher {estimate['teacher']}[/]", soft_wrap=True)
    splits = ", ".join(f"{tokens['splits'][split]:,} {split}" for split in tokens["splits"])
    console.print(f"tokens: {splits} ({tokens['origin']})", soft_wrap=True)
    chosen = f"{tokens['captured']:,} tokens in {estimate['segments']:,} segments"
    console.print(f"captured: {chosen}; bytes are {estimate['bytes']}", soft_wrap=True)
    if estimate["training_segments"] == 1:
        console.print(
            "the training text is one segment, so a capture that is interrupted begins anew; lower "
            "capture.segment_tokens to resume within it",
            soft_wrap=True,
        )
    if estimate["is_batch_found"]:
        console.print(
            "batch_tokens is auto: memory is that of batches of "
            f"{estimate['batch_tokens']:,} tokens",
            soft_wrap=True,
        )
    console.print()
    print_whole(console, _signals(estimate))
    _disk(console, estimate)
    console.print()
    _memory(console, estimate)
    _time(console, estimate)
    if estimate["budget"] is not None:
        console.print()
        _budget(console, estimate["budget"])


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in RIGHT else "left", no_wrap=True)
    return table


def _signals(estimate: dict[str, Any]) -> Table:
    has_store = estimate["total"]["took_bytes"] is not None
    took = ("took",) if has_store else ()
    table = _table(
        "signal", "form", "splits", "tokens", "B/token", "raw", "expected", "at most", *took
    )

    def stored(sizes: dict[str, Any]) -> tuple[str, ...]:
        if not has_store:
            return ()
        return ("–" if sizes["took_bytes"] is None else show_size(sizes["took_bytes"]),)

    for signal in estimate["signals"]:
        name = signal["kind"] if signal["layer"] is None else f"{signal['kind']}/{signal['layer']}"
        table.add_row(
            name,
            signal["form"],
            signal["splits"],
            f"{signal['tokens']:,}",
            f"{signal['token_bytes']:,.1f}",
            show_size(signal["raw_bytes"]),
            show_size(signal["expected_bytes"]),
            show_size(signal["most_bytes"]),
            *stored(signal),
        )
    for name, count in estimate["assets"].items():
        size = show_size(count)
        table.add_row(name, "asset", "", "", "", size, size, size, *(("",) if has_store else ()))
    table.add_row(
        "tokens, examples, records", "", "", "", "", "",
        show_size(estimate["tables_bytes"]), show_size(estimate["tables_bytes"]),
        *(("",) if has_store else ()),
    )  # fmt: skip
    total = estimate["total"]
    table.add_row(
        "[bold]in all[/]", "", "", "", "",
        show_size(total["raw_bytes"] + sum(estimate["assets"].values())),
        show_size(total["expected_bytes"]), show_size(total["most_bytes"]), *stored(total),
    )  # fmt: skip
    return table


def _disk(console: Console, estimate: dict[str, Any]) -> None:
    disk, total = estimate["disk"], estimate["total"]
    free = f"{show_size(disk['free_bytes'])} free at {disk['path']}"
    if total["took_bytes"] is not None:
        planned = show_size(total["expected_bytes"])
        console.print(
            f"the store is complete: estimated {planned}, took "
            f"{show_size(total['took_bytes'])}; {free}",
            soft_wrap=True,
        )
        return
    sentence = "it fits" if disk["fits"] else "[bold]it does not fit[/], capture will refuse it"
    needed = show_size(disk["needed_bytes"])
    console.print(f"{free}, at most {needed} needed: {sentence}", soft_wrap=True)
    if not disk["fits"]:
        console.print(
            f"to compare smaller choices: decant plan {estimate['teacher']} --budget "
            f"{show_size(disk['free_bytes'] * 0.9).replace(' ', '')}",
            soft_wrap=True,
        )


def _memory(console: Console, estimate: dict[str, Any]) -> None:
    memory = estimate["memory"]["capture"]
    sentence = f"{show_size(memory['weight_bytes'])} weights ({memory['dtype']})"
    if memory["peak_bytes"] is None:
        sentence += f" + about {show_size(memory['activation_bytes'])} of a batch (an estimate)"
    else:
        sentence += (
            f"; {show_size(memory['peak_bytes'])} at its peak while probing, {memory['peak_of']}"
        )
    sentence += f"; {show_size(memory['buffer_bytes'])} of segments on the host"
    console.print(f"memory of the capture: {sentence}", soft_wrap=True)
    students = estimate["memory"]["students"]
    if not students:
        return
    console.print("memory of the students (all but weights, gradients and moments are estimates):")
    table = _table(
        "student", "parameters", "weights, gradients, moments", "teacher's head, features",
        "activations", "pool (host)", "epochs",
    )  # fmt: skip
    for name, memory in students.items():
        if "error" in memory:
            continue
        exact = memory["weight_bytes"] + memory["gradient_bytes"] + memory["moment_bytes"]
        table.add_row(
            name,
            f"{memory['parameters']:,}",
            show_size(exact + memory["projector_bytes"]),
            show_size(memory["teacher_bytes"]),
            show_size(memory["activation_bytes"]),
            show_size(memory["pool_bytes"]),
            f"{memory['epochs']:g}",
        )
    print_whole(console, table)
    for name, memory in students.items():
        if "error" in memory:
            console.print(f"{name}: {memory['error']}", soft_wrap=True, markup=False)


def _time(console: Console, estimate: dict[str, Any]) -> None:
    time = estimate["time"]
    if time is None:
        console.print("time: unknown without --probe")
        return
    bare, captured, read = (
        _seconds(time[f"{key}_seconds"]) for key in ("forward", "capture", "read")
    )
    console.print(
        f"time on {time['device']}, measured on {time['probed_tokens']:,} tokens: a token takes "
        f"{bare} of teacher alone, {captured} captured, {read} read back; the capture "
        f"{_duration(time['capture_total_seconds'])}",
        soft_wrap=True,
    )
    pays, planned = time["pays_from"], time["planned"]
    if pays is None:
        sentence = "never: reading back takes as long as the teacher itself"
    else:
        sentence = f"from {pays:.2g} epochs × students; params.yaml plans {planned:g}"
    console.print(f"the store pays {sentence}", soft_wrap=True)


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
    print_whole(console, table)
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
