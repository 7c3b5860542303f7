"""The plots of the page: a term over the steps, quality against size, bytes per token."""

import math
from collections.abc import Callable, Mapping, Sequence

from matplotlib import ticker
from matplotlib.axis import Axis

from pipeline.report import words
from pipeline.report.compare import Comparison
from pipeline.report.figures import INK, axes, mark, svg
from pipeline.report.results import Curve, SignalResult, labels

# More points than pixels only make the page heavy.
MAX_POINTS = 160
TERM_ORDER = ("loss", "feature", "attention", "output", "labels", "learning_rate")


def terms_of(curves: Mapping[str, Curve]) -> list[str]:
    """Return every term that some curve has values of, the known ones first."""
    found = {
        term
        for curve in curves.values()
        for term, values in curve.terms.items()
        if any(value is not None for value in values)
    }
    return [term for term in TERM_ORDER if term in found] + sorted(found - {*TERM_ORDER})


def plot_term(term: str, curves: Mapping[str, Curve], order: Sequence[str]) -> str:
    """Draw one term of every student that has it, over the steps.

    The scale is logarithmic where all values are positive and span more than a factor of ten.

    Args:
        term: A column of the curves.
        curves: By student.
        order: All students, in the order that gives their colours.
    """
    lines: dict[str, tuple[list[float], list[float]]] = {}
    for name in order:
        if name in curves and term in curves[name].terms:
            line = _points(curves[name], term)
            if line[0]:
                lines[name] = line
    values = [value for _, ys in lines.values() for value in ys]
    name = f"curve-{term}"
    with axes(name, width=3.9, height=2.5) as drawn:
        for student, (steps, ys) in lines.items():
            color, dash = mark(order.index(student))
            drawn.plot(
                steps,
                ys,
                color=color,
                linestyle=dash,
                marker="o" if len(steps) == 1 else "",
                markersize=4,
            )
        is_rate = term == "learning_rate"
        if not is_rate and values and min(values) > 0 and max(values) > 10 * min(values):
            drawn.set_yscale("log")
            _plain_log(drawn.yaxis, min(values), max(values))
        else:
            drawn.yaxis.set_major_locator(ticker.MaxNLocator(5))
            if is_rate:
                drawn.yaxis.set_major_formatter("{x:.2g}")
        drawn.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
        if len({step for steps, _ in lines.values() for step in steps}) == 1:
            drawn.set_xticks(next(iter(lines.values()))[0])
        drawn.set_title(term.replace("_", " "))
        drawn.set_xlabel("step")
        drawn.grid(visible=True)
        return svg(drawn, description=f"{term} over the training steps of {', '.join(lines)}")


def plot_quality(comparison: Comparison, order: Sequence[str]) -> str | None:
    """Draw quality against parameters, teachers as rings; None where nothing is known.

    Args:
        comparison: All models.
        order: All students, in the order that gives their colours.
    """
    points = [
        (row, float(row.metrics.parameters), row.quality)
        for row in comparison.rows
        if row.metrics.parameters and row.quality is not None
    ]
    if not points:
        return None
    with axes("quality-against-size", width=5.8, height=3.2) as drawn:
        for row, size, quality in points:
            color = INK if row.is_teacher else mark(order.index(row.name))[0]
            drawn.plot(
                [size],
                [quality],
                linestyle="none",
                marker="o",
                markersize=10 if row.is_teacher else 8,
                color=color,
                fillstyle="none" if row.is_teacher else "full",
                markeredgewidth=2,
            )
        sizes = [size for _, size, _ in points]
        drawn.set_xscale("log")
        drawn.set_xlim(min(sizes) / 1.35, max(sizes) * 1.6)
        _plain_log(drawn.xaxis, *drawn.get_xlim(), show=words.count)
        drawn.margins(y=0.14)
        drawn.set_xlabel("parameters")
        drawn.set_ylabel(comparison.quality_name)
        direction = "lower" if comparison.is_lower_better else "higher"
        drawn.set_title(f"{direction} and further left is better")
        drawn.yaxis.set_major_locator(ticker.MaxNLocator(6))
        if comparison.headline.is_percent:
            drawn.yaxis.set_major_formatter(lambda value, _: words.percent(value))
        drawn.grid(visible=True)
        low, high = drawn.get_ylim()
        heights = _spread(
            [(math.log(size), quality) for _, size, quality in points],
            reach=0.25 * math.log(drawn.get_xlim()[1] / drawn.get_xlim()[0]),
            gap=(high - low) * 0.075,
        )
        for (row, size, quality), height in zip(points, heights, strict=True):
            drawn.annotate(
                row.name,
                (size, quality),
                xytext=(size * 1.06, height),
                verticalalignment="center",
                fontsize=10,
                # A name is text, not a formula in dollar signs.
                parse_math=False,
            )
        return svg(drawn, description=f"{comparison.quality_name} against parameters")


def plot_bytes(teacher: str, signals: Sequence[SignalResult]) -> str | None:
    """Draw the bytes a token of every signal of a teacher; None where nothing was captured."""
    known = [
        (label, signal.signal.split("/")[0], signal.bytes_per_token)
        for label, signal in zip(labels(signals), signals, strict=True)
        if signal.bytes_per_token is not None
    ]
    if not known:
        return None
    kinds = list(dict.fromkeys(kind for _, kind, _ in known))
    with axes(f"bytes-{teacher}", width=5.8, height=0.7 + 0.27 * len(known)) as drawn:
        places = range(len(known))
        sizes = [size for _, _, size in known]
        bars = drawn.barh(
            places,
            sizes,
            height=0.66,
            color=[mark(kinds.index(kind))[0] for _, kind, _ in known],
        )
        drawn.bar_label(bars, labels=[words.data(size) for size in sizes], padding=4)
        drawn.set_yticks(places, [label for label, _, _ in known], parse_math=False)
        drawn.tick_params(axis="y", length=0)
        drawn.invert_yaxis()
        drawn.margins(x=0.12, y=0.02)
        drawn.set_xlabel("bytes a token")
        drawn.grid(visible=True, axis="x")
        drawn.set_axisbelow(True)
        return svg(drawn, description=f"bytes a token of every signal of {teacher}")


def _points(curve: Curve, term: str) -> tuple[list[float], list[float]]:
    """Return a term's steps and values without gaps; too many are averaged in runs."""
    pairs = [
        (float(step), value)
        for step, value in zip(curve.step, curve.terms[term], strict=True)
        if value is not None
    ]
    run = math.ceil(len(pairs) / MAX_POINTS) or 1
    runs = [pairs[start : start + run] for start in range(0, len(pairs), run)]
    return (
        [sum(step for step, _ in some) / len(some) for some in runs],
        [sum(value for _, value in some) / len(some) for some in runs],
    )


def _spread(points: Sequence[tuple[float, float]], *, reach: float, gap: float) -> list[float]:
    """Heights of labels at points, moved apart where two are nearer than `reach` and `gap`."""
    order = sorted(range(len(points)), key=lambda index: points[index][1])
    heights = [height for _, height in points]
    pairs = [
        (below, above)
        for place, below in enumerate(order)
        for above in order[place + 1 :]
        if abs(points[below][0] - points[above][0]) < reach
    ]
    # Each pass parts every close pair by half of what is missing on either side; a run has few
    # models, so this settles.
    for _ in range(50):
        for below, above in pairs:
            missing = gap - (heights[above] - heights[below])
            if missing > 1e-9 * gap:
                heights[below] -= missing / 2
                heights[above] += missing / 2
    return heights


def _plain_log(
    axis: Axis, low: float, high: float, show: Callable[[float], str] = "{:g}".format
) -> None:
    """Label a logarithmic axis with plain numbers, about five of them."""
    wide = high / low > 300
    subs = (1.0,) if wide else (1.0, 2.0, 5.0) if high / low > 4 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.set_major_locator(ticker.LogLocator(subs=subs, numticks=12))
    axis.set_minor_locator(ticker.NullLocator())
    axis.set_major_formatter(lambda value, _: show(value))
