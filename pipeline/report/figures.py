"""Turns a matplotlib figure into an SVG element of a page; equal numbers give equal bytes.

Ink is `currentColor`, so that a figure follows the page into dark mode; ids carry the figure's
name, so that several share a page; no namespace, date or version is left in the text.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from pipeline.visible import visible

# Placeholder for the page's text colour: matplotlib does not know currentColor.
INK = "#010203"
# Okabe and Ito's colours without black and yellow: told apart by the colour-blind, legible on
# both backgrounds.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
DASHES = ("solid", "dashed", "dotted", "dashdot")

RC = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.formatter.useoffset": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
}


def mark(index: int) -> tuple[str, str]:
    """Colour and line style of the model at `index`; no two of the first 24 are alike."""
    return PALETTE[index % len(PALETTE)], DASHES[index // len(PALETTE) % len(DASHES)]


@contextmanager
def axes(name: str, *, width: float, height: float) -> Iterator[Axes]:
    """Give empty axes in the page's style, whatever matplotlibrc says.

    Args:
        name: The figure's name, unique on its page.
        width: Width in inches.
        height: Height in inches.
    """
    with style.context(["default", RC | {"svg.hashsalt": name}]):
        figure = Figure(figsize=(width, height), layout="constrained")
        figure.set_gid(name)
        FigureCanvasSVG(figure)
        yield figure.subplots()


def svg(drawn: Axes, *, description: str) -> str:
    """Turn a figure into an inline SVG element; call it inside `axes`.

    Args:
        drawn: The axes drawn on.
        description: What a screen reader says.
    """
    figure = drawn.get_figure(root=True)
    assert figure is not None  # axes() made it
    # A term's name is whatever heads a column of a curve.
    name = re.sub(r"[^\w.-]", "-", str(figure.get_gid()))
    buffer = io.StringIO()
    figure.savefig(
        buffer,
        format="svg",
        transparent=True,
        metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
    )
    text = visible(buffer.getvalue())
    text = text[text.index("<svg") :]
    text = re.sub(r'\s(?:xmlns(?::xlink)?|version)="[^"]*"', "", text)
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href=", "href=").replace(INK, "currentColor")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    label = visible(escape(description, quote=True)).replace("\\", r"\\")
    # The page sets the width; the view box keeps the shape.
    return re.sub(
        r'<svg width="[^"]*" height="[^"]*"', f'<svg role="img" aria-label="{label}"', text, count=1
    )
