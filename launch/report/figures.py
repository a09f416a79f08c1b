"""Drawing: one palette, axes without clutter, names written at the ends of lines instead of legends."""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, MaxNLocator

INK, MUTED, GRID, SURFACE = "#1b2128", "#5b6672", "#dde2e7", "#fffffe"
BLUE, ORANGE, GREEN, PURPLE, RED = "#0b6bb8", "#c2560c", "#0f8a67", "#9a4fb0", "#b8344a"
SERIES = (BLUE, ORANGE, GREEN, PURPLE, RED)
"""Distinguishable with every common color blindness, at least 3:1 against both backgrounds' own variants."""

_CSS = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", SURFACE: "--surface",
    BLUE: "--blue", ORANGE: "--orange", GREEN: "--green", PURPLE: "--purple", RED: "--red",
}  # fmt: skip

Draw = Callable[[Axes], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A small picture with a title, and a sentence about how to read it."""

    title: str
    note: str
    draw: Draw


@dataclass(frozen=True, slots=True, kw_only=True)
class Margins:
    """Margins of the axes as shares of the picture; with the same for all, their axes line up."""

    left: float
    right: float
    bottom: float
    top: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EndLabel:
    """Label written at the end of a line."""

    y: float
    text: str
    color: str


def to_svg(
    draw: Callable[[Figure], None], width: float, height: float, name: str, margins: Margins | None = None
) -> str:
    """A drawing as inline SVG. Its colors are the page's CSS variables, its letters the page's font.

    `name` tells this picture's element ids from those of others on the page. Without `margins` the
    drawing finds its own.
    """
    with _style(hashsalt=name):
        figure = Figure(figsize=(width, height), layout=None if margins else "constrained")
        draw(figure)
        if margins:
            figure.subplots_adjust(left=margins.left, right=margins.right, bottom=margins.bottom, top=margins.top)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    markup = buffer.getvalue()
    markup = re.sub(r"<metadata>.*?</metadata>", "", markup[markup.index("<svg") :], flags=re.DOTALL)
    markup = re.sub(r' xmlns(:\w+)?="[^"]*"| width="[\d.]+pt"| height="[\d.]+pt"', "", markup)
    for color, variable in _CSS.items():
        markup = markup.replace(color, f"var({variable})")
    return markup.strip()


def to_png(draw: Callable[[Figure], None], width: float, height: float) -> bytes:
    """A drawing as a picture on a light background."""
    with _style(hashsalt="png"):
        layout = ConstrainedLayoutEngine(w_pad=0.18, h_pad=0.16, wspace=0.02, hspace=0.06)
        figure = Figure(figsize=(width, height), layout=layout, facecolor=SURFACE)
        draw(figure)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()


@contextmanager
def _style(hashsalt: str) -> Iterator[None]:
    rules: dict[Any, Any] = {
        "font.family": "sans-serif",
        "font.size": 9.5,
        "text.color": INK,
        "text.parse_math": False,  # a `$` in a label is a dollar
        "axes.edgecolor": GRID,
        "axes.labelcolor": MUTED,
        "axes.titlecolor": INK,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "grid.color": GRID,
        "grid.linewidth": 0.8,
        "xtick.color": MUTED,
        "ytick.color": MUTED,
        "ytick.major.size": 0,
        "xtick.major.size": 3,
        "lines.linewidth": 1.9,
        "lines.solid_capstyle": "round",
        "svg.fonttype": "none",
        "svg.hashsalt": hashsalt,
    }
    with matplotlib.rc_context(rules):
        yield


def whole_steps(axes: Axes, label: str = "step") -> None:
    """Format a horizontal axis of steps."""
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))


def percent(axes: Axes) -> None:
    """Format a vertical axis of shares."""
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))


def short_number(value: float) -> str:
    """Number in short form, e.g. 345000 as `345 k`, 1.8e12 as `1.8 T`."""
    for unit, size in (("E", 1e18), ("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:.3g}"


def label_ends(axes: Axes, labels: Sequence[EndLabel], gap: float = 0.085) -> None:
    """Write names right of the axes where their lines end, apart from each other.

    Call it when the limits are final. `gap` is the height of a line of text as a share of the axes.
    """
    low, high = axes.get_ylim()
    scale = axes.yaxis.get_transform()
    bottom, top = scale.transform([low, high])
    ordered = sorted(labels, key=lambda label: label.y)
    heights = [(float(scale.transform([label.y])[0]) - bottom) / (top - bottom) for label in ordered]
    for label, height in zip(ordered, spread(heights, gap), strict=True):
        axes.text(1.02, height, label.text, color=label.color, transform=axes.transAxes, va="center", size=9)


def spread(heights: Sequence[float], gap: float) -> list[float]:
    """Ascending heights moved apart to at least `gap`, as little as possible and not above 1.

    Neighbors that collide become a block around their mean; blocks that collide are joined.
    """
    blocks: list[list[float]] = []  # wanted heights of the labels of each block

    def bottom(block: list[float]) -> float:
        size = (len(block) - 1) * gap
        return min(max(float(np.mean(block)) - size / 2, 0.0), max(0.0, 1.0 - size))

    for height in heights:
        blocks.append([height])
        while len(blocks) > 1:
            before = bottom(blocks[-2]) + len(blocks[-2]) * gap
            if bottom(blocks[-1]) >= before:
                break
            last = blocks.pop()
            blocks[-1] += last
    return [bottom(block) + i * gap for block in blocks for i in range(len(block))]


def smooth(values: np.ndarray, share: float = 0.08) -> np.ndarray:
    """A running mean over `share` of the run, centered so that it does not lag; one-sided at the ends."""
    half = int(len(values) * share / 2)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    start, stop = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (sums[stop] - sums[start]) / (stop - start)


def thinned(count: int, most: int = 400) -> np.ndarray:
    """Indices of the drawn points among `count`: all of them, or `most` evenly spaced ones with both ends."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).round().astype(int))
