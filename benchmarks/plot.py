"""Draws what `benchmarks/results` holds for the documents.

Run `python -m benchmarks.plot`. One panel shows a training step by where its features come from,
the other a capture beside the teacher's bare forward pass; a panel without results is left out.
Bars are medians over the turns, lines least to most.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.results import RESULTS, read
from pipeline.report.figures import INK, PALETTE, RC

OURS, OTHERS, TEACHER = PALETTE[0], "#9aa0a6", PALETTE[1]
STEP = {
    "store": "from the store",
    "memmap": "np.memmap, float16",
    "litdata": "LitData",
    "safetensors": "safetensors a sample",
    "zarr_dask": "zarr + dask",
    "live": "live teacher",
}
CAPTURE = {
    "ours_head": "ours, logits as head",
    "ours_topk": "ours, logits as top 64",
    "safetensors": "safetensors a sample",
    "dask": "dask.array.to_zarr",
    "eager": "eager maps, torch.save",
}
OWN = ("store", "ours_head", "ours_topk")


class Bar(NamedTuple):
    """One bar, a ratio, with its least and most."""

    name: str
    label: str
    median: float
    least: float
    most: float


def bars(figures: Mapping[str, Any], labels: Mapping[str, str], key: str) -> list[Bar]:
    """Return the arms that were measured.

    Args:
        figures: Of one benchmark.
        labels: By arm.
        key: What follows the arm in a figure's name.
    """
    return [
        Bar(name, label, **figures[f"{name}_{key}"])
        for name, label in labels.items()
        if f"{name}_{key}" in figures
    ]


def panel(drawn: Axes, found: Sequence[Bar], title: str) -> None:
    """Draw bars on a scale from 0, the base as a line at 1."""
    places = list(range(len(found)))[::-1]
    colors = [
        OURS if bar.name in OWN else TEACHER if bar.name == "live" else OTHERS for bar in found
    ]
    # A rival far beyond the others is cut, or these would all be of one length.
    shown = [bar.most for bar in found if bar.name in (*OWN, "live")]
    limit = 1.15 * min(max(bar.most for bar in found), max(3.0, *shown))
    medians = [min(bar.median, limit) for bar in found]
    drawn.barh(places, medians, color=colors, height=0.62)
    for bar, place in zip(found, places, strict=True):
        if bar.median < limit:
            ends = [bar.least, min(bar.most, limit)]
            drawn.plot(ends, [place, place], color=INK, linewidth=1.2)
        right = min(max(bar.most, bar.median), limit)
        drawn.annotate(
            f"{bar.median:.2f}" if bar.median < limit else f"→ {bar.median:.1f}",
            (right, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold" if bar.name in OWN else "normal",
            annotation_clip=False,
        )
    drawn.axvline(1, color=INK, linewidth=1, linestyle="dashed")
    drawn.set_yticks(places, [bar.label for bar in found])
    drawn.tick_params(axis="y", length=0)
    drawn.set_xlim(0, limit)
    drawn.spines["left"].set_visible(False)
    drawn.set_title(title)
    drawn.grid(visible=True, axis="x")
    drawn.set_axisbelow(True)


def draw(results: Path, target: Path) -> bool:
    """Draw the results of a directory into a file; tell whether there was anything to draw."""
    kinds = (
        ("train", STEP, "seconds_over_ram", "a training step, over one from memory"),
        ("capture", CAPTURE, "wall_over_forward", "a capture, over the forward pass"),
    )
    found = []
    for name, labels, key, title in kinds:
        kept = read(name, results)
        arms = bars(kept["figures"], labels, key) if kept else []
        if arms:
            found.append((arms, title))
    if not found:
        return False
    heights = [len(arms) + 1.6 for arms, _ in found]
    with style.context(["default", RC | {"savefig.dpi": 200}]):
        figure = Figure(figsize=(7, 0.3 * sum(heights)), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(len(found), 1, squeeze=False, height_ratios=heights)[:, 0]
        for drawn, (arms, title) in zip(panels, found, strict=True):
            panel(drawn, arms, title)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, facecolor="white")
    return True


@click.command()
@click.option("--results", default=RESULTS, type=click.Path(path_type=Path), show_default=False)
@click.option("--target", default=Path("docs/benchmarks.png"), type=click.Path(path_type=Path))
def main(results: Path, target: Path) -> None:
    """Draw what the benchmarks have found."""
    if not draw(results, target):
        raise click.ClickException(f"{results}: no results to draw; run make bench")
    click.echo(str(target))


if __name__ == "__main__":
    main()
