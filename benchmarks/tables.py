"""Writes the tables of measured figures in the pages from `benchmarks/results`.

Run `python -m benchmarks.tables`. A page marks where a table stands, between the comments
`<!-- benchmark: NAME -->` and `<!-- end -->`; everything between them is replaced.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, read

PAGES = Path(__file__).parents[1]
REGION = re.compile(
    r"(?<=<!-- benchmark: )(\w+)( -->\n)((?:(?!<!-- benchmark: ).)*?)(?=<!-- end -->)", re.DOTALL
)
"""A region without its end matches nothing: the next one's end would take the text between."""
Figures = Mapping[str, Any]

CAPTURE = {
    "ours_head": "ours, `head`",
    "ours_topk": "ours, `topk` 64",
    "eager": "eager maps, all layers, `torch.save` a batch",
    "safetensors": "hidden states alone, safetensors a sample",
    "dask": "hidden states alone, `dask.array.to_zarr`",
}
STEP = {
    "store": "from the store",
    "memmap": "`np.memmap`, float16",
    "litdata": "LitData",
    "safetensors": "safetensors a sample, `DataLoader`",
    "zarr_dask": "`dask.array.from_zarr`",
    "live": "a live teacher in the step",
}
CAPPED = {
    "plain": "labels, transformers' own loss",
    "labels": "labels, the loss in chunks",
    "soft": "outputs alone (`soft`)",
    "aligned": "all three terms",
}


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(re.sub(r"\|\s+(?=\|)", "| ", f"| {' | '.join(line)} |\n") for line in lines)


def _spread(ratio: Mapping[str, float]) -> str:
    return f"{ratio['median']:.2f} ({ratio['least']:.2f} to {ratio['most']:.2f})"


def capture(figures: Figures) -> str:
    """A capture over the teacher's forward pass."""
    tokens, teacher = figures["tokens"], figures["teacher"].partition(",")[0].replace("x", "×")
    return _table(
        [f"{teacher}, {tokens:,} tokens", "wall", "CPU seconds", "bytes a token"],
        [
            [
                label,
                _spread(figures[f"{name}_wall_over_forward"]),
                _spread(figures[f"{name}_cpu_over_forward"]),
                f"{figures[f'{name}_bytes_a_token']:,.0f}",
            ]
            for name, label in CAPTURE.items()
        ],
    )


def codecs(figures: Figures) -> str:
    """One shard by our codec and by Zarr's pipelines."""
    return _table(
        ["", "ms", "CPU ms", "bytes a value"],
        [
            [row["name"], f"{row['ms']:.1f}", f"{row['cpu_ms']:.1f}", f"{row['bytes']:.3f}"]
            for row in figures["codecs"]
        ],
    )


def step(figures: Figures) -> str:
    """A training step by where its features come from, over the step from memory."""
    rows = []
    for name, label in STEP.items():
        if f"{name}_seconds_over_ram" not in figures:
            continue  # not installed on that machine
        cold = figures.get(f"cold_{name}_seconds_over_ram")
        size = figures.get(f"{name}_bytes_a_token")
        rows.append(
            [
                label,
                f"{figures[f'{name}_seconds_over_ram']['median']:.2f}",
                "" if cold is None else f"{cold['median']:.2f}",
                "" if size is None else f"{size:,.0f}",
            ]
        )
    length = f"{1e3 * figures['ram_step_seconds']['median']:.0f} ms"
    head = f"a step of {length}, medians of {figures['laps']} laps"
    return _table([head, "over memory", "cold cache", "bytes a token on disk"], rows)


def chunks(figures: Figures) -> str:
    """Losses computed a chunk at a time over the same losses at once."""
    labels = {
        "loss": "forward KL through both heads, vocabulary 131,072, width 512, 2,048 rows",
        "attention": "attention, 6 layers of 12 heads, 512 tokens, batch of 2",
    }
    rows = []
    for name, label in labels.items():
        peak = f"{figures[f'{name}_our_peak_mib']:,.0f} MiB"
        rows.append(
            [
                label,
                f"{figures[f'{name}_full_peak_mib']:,.0f} MiB",
                f"{peak} ({figures[f'{name}_peak_over_full']:.2f})",
                f"{figures[f'{name}_time_over_full']:.2f}",
                f"{figures[f'{name}_gradient_difference']:.1e}".replace("e-0", "e-"),
            ]
        )
    return _table(["", "plain, peak", "ours, peak", "time over plain", "gradients differ by"], rows)


def capped(figures: Figures) -> str:
    """The peak of a student's process by its terms."""
    # A run with one batch in memory is compared with labels held in the same way.
    shown = [("free", name, label) for name, label in CAPPED.items()]
    shown.append(("held", "aligned", "all three terms, but for the segments in memory"))
    return _table(
        ["", "GB", "over labels, transformers' loss", "over labels, the loss in chunks"],
        [
            [
                label,
                f"{figures[way][name]['peak_bytes'] / 1e9:.2f}",
                *(
                    f"{figures[way][name]['peak_bytes'] / figures[way][base]['peak_bytes']:.2f}"
                    for base in ("plain", "labels")
                ),
            ]
            for way, name, label in shown
        ],
    )


def students(figures: Figures) -> str:
    """Four students from one read of the store, over one by one."""
    alone, together = figures["one by one"], figures["together"]
    over = figures["together_over_one_by_one"]
    units = {"segments_decoded": ("segments decoded", 1.0, "{:.0f}")}
    units["bytes_read"] = ("MB read", 1e6, "{:,.0f}")
    units["seconds"] = ("seconds", 1.0, "{:.0f}")
    units["cpu_seconds"] = ("CPU seconds", 1.0, "{:.0f}")
    units["peak_bytes"] = ("GB at the peak", 1e9, "{:.2f}")
    return _table(
        ["", "one by one", "together", "ratio"],
        [
            [
                label,
                form.format(alone[key] / unit),
                form.format(together[key] / unit),
                _spread(over[key]) if key in over else "",
            ]
            for key, (label, unit, form) in units.items()
        ],
    )


TABLES: dict[str, tuple[str, Callable[[Figures], str]]] = {
    "capture": ("capture", capture),
    "codecs": ("capture", codecs),
    "step": ("train", step),
    "chunks": ("train", chunks),
    "capped": ("capped", capped),
    "students": ("students", students),
}
"""By the name in a page: the result file, and what makes the table of its figures."""


def filled(page: str, results: Path = RESULTS) -> str:
    """Return a page with its tables written anew.

    Raises:
        KeyError: If a page names a table that there is not.
    """

    def table(region: re.Match[str]) -> str:
        name, make = TABLES[region[1]]
        kept = read(name, results)
        return region[0] if kept is None else f"{region[1]}{region[2]}{make(kept['figures'])}"

    return REGION.sub(table, page)


def main() -> None:
    """Write the tables of all pages."""
    for path in [PAGES / "README.md", *sorted((PAGES / "docs").glob("*.md"))]:
        before = path.read_text()
        after = filled(before)
        if after != before:
            path.write_text(after)


if __name__ == "__main__":
    main()
