"""Plots as SVG text, by matplotlib. The same data gives the same text: no date, no random ids."""

from __future__ import annotations

import io
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

COLOURS = ["#2a6fdb", "#d9622b", "#23915d", "#9a4fb8", "#a8790a", "#c2385a"]
TEXT, GRID = "#68707c", "#e3e6ea"
# In a page these are replaced by its own colours, which are others in the dark.
VARIABLES = {TEXT: "--dim", GRID: "--line", **{c: f"--c{i}" for i, c in enumerate(COLOURS)}}
TOOLTIP = "tooltip: "  # begins the gid of what has a tooltip
DOTS = 25  # points of a line, up to which each has a dot with its tooltip
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True, "axes.edgecolor": TEXT, "axes.grid": True, "axes.grid.axis": "y",
    "axes.labelcolor": TEXT, "axes.spines.left": False, "axes.spines.right": False,
    "axes.spines.top": False, "font.sans-serif": ["DejaVu Sans"], "font.size": 8, "grid.color": GRID,
    "legend.frameon": False, "legend.labelcolor": TEXT, "legend.title_fontsize": 9,
    "lines.linewidth": 1.3, "lines.markersize": 3.5, "svg.fonttype": "none",
    "svg.hashsalt": "sgan_dist", "xtick.color": TEXT, "ytick.color": TEXT, "ytick.left": False,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A point of a line; with a standard deviation it gets an error bar, with a text a tooltip."""

    x: float
    y: float
    std: float = 0.0
    text: str = ""


def number(value: float) -> str:
    """Four digits, with commas between thousands."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(fraction: float, digits: int = 2) -> str:
    """`0.0123` as `1.23 %`."""
    return f"{100 * fraction:.{digits}f} %"


def duration(seconds: float) -> str:
    """`4000` as `1 h 6 min`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def plot_lines(
    lines: Mapping[str, Sequence[Point]],
    x_label: str,
    *,
    unit: str = "",
    log: bool = False,
    log_x: bool = False,
    x_ticks: Sequence[float] | None = None,
    title: str | None = None,
) -> Figure:
    """A figure of lines by name; with a title there is also a legend.

    `log` is ignored where a value is negative or all are zero. On a log axis zeros lie at its foot,
    and so do the ends of error bars that come near zero.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_figure(x_label)
        all_points = [point for points in lines.values() for point in points]
        log = log and min(p.y for p in all_points) >= 0 and max(p.y for p in all_points) > 0
        low, high = _limits(all_points, log)
        for (name, points), colour in zip(lines.items(), itertools.cycle(COLOURS), strict=False):
            x, y = [point.x for point in points], [max(point.y, low) for point in points]
            axes.plot(x, y, color=colour, label=name)
            if any(point.std for point in points):
                ends = [max(point.y - point.std, low) for point in points]
                sizes = np.array([np.subtract(y, ends), [point.std for point in points]])
                axes.errorbar(x, y, sizes, fmt="none", ecolor=colour, capsize=2.5)
            for point, height in zip(points, y, strict=True):
                if point.text and len(points) <= DOTS:
                    axes.plot(point.x, height, "o", color=colour, gid=TOOLTIP + point.text)
        if log_x:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(10, [1.0, 2.0, 5.0]))
        if log:
            axes.set_yscale("log")
            digits = [1.0] if high > 300 * low else [1.0, 2.0, 5.0]
            logarithmic = LogLocator(10, digits, numticks=7)
            axes.yaxis.set_major_locator(logarithmic if high > 8 * low else MaxNLocator(5))
        if x_ticks is not None:
            axes.set_xticks(x_ticks)
        axes.minorticks_off()
        axes.set_ylim(low, high)
        axes.xaxis.set_major_formatter(lambda value, _: number(value))
        axes.yaxis.set_major_formatter(lambda value, _: number(value) + unit)
        if title is not None:
            figure.set_figheight(figure.get_figheight() + 0.18 * len(lines))
            figure.legend(loc="outside upper left", title=title, alignment="left")
        return figure


def plot_bars(heights: Sequence[float], x_label: str) -> Figure:
    """A figure of bars of equal width from 0 to 100."""
    with matplotlib.rc_context(STYLE):
        figure, axes = _new_figure(x_label)
        width = 100 / len(heights)
        places = width * (np.arange(len(heights)) + 0.5)
        axes.bar(places, heights, 0.9 * width, color=COLOURS[0], alpha=0.5)
        axes.set_xlim(0, 100)
        return figure


def svg(figure: Figure) -> str:
    """The content of an SVG file."""
    text = io.StringIO()
    with matplotlib.rc_context(STYLE):
        no_metadata = dict.fromkeys(["Creator", "Date", "Format", "Type"])
        figure.savefig(text, format="svg", metadata=no_metadata)
    short = re.sub(r"\s*<!--.*?-->|(?<=\n)\s+", "", text.getvalue())
    return re.sub(rf'<g id="{TOOLTIP}([^"]*)">', r"<g><title>\1</title>", short)


def inline_svg(figure: Figure, label: str) -> Markup:
    """An <svg> element for an HTML page that defines the variables of `VARIABLES`."""
    figure.patch.set_visible(False)
    figure.axes[0].patch.set_visible(False)
    text = svg(figure)
    view_box = text[text.index("viewBox=") :].split('"')[1]
    content = text[text.index("<defs>") :]  # without XML's head
    content = re.sub(
        r' clip-path="[^"]*"| id="[^"]*_\d+"|<style.*?</style>', "", content, flags=re.S
    )
    for colour, variable in VARIABLES.items():
        content = content.replace(colour, f"var({variable})")
    return Markup(f'<svg viewBox="{view_box}" role="img" aria-label="{escape(label)}">{content}')


def _new_figure(x_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.7, 2.6), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xlabel(x_label, loc="right")
    return figure, axes


def _limits(points: Sequence[Point], log: bool) -> tuple[float, float]:
    """A little beyond the smallest and the largest value; never an empty range."""
    heights = [point.y for point in points]
    ends = [point.y + side * point.std for point in points for side in (-1, 1)]
    # an error bar that comes near 0 ends at the foot of the axis, and does not stretch it
    values = heights + [end for end in ends if end >= min(heights) / 3]
    if log:
        return min(value for value in values if value > 0) / 1.1, max(values) * 1.1
    low, high = min(0.0, *values), max(values)
    margin = 0.04 * (high - low) or 1.0
    return (low - margin if low < 0 else 0.0), high + margin
