"""How the report looks: its page, tables, pictures, and charts as inline SVG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

from PIL import Image

Point = tuple[float, float]

WIDTH, HEIGHT = 470, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 18, 8, 30
COLOURS = 6
MOST_POINTS = 400  # more are drawn as the least and greatest of each of half as many stretches
LARGEST_PNG = 100_000  # bytes; a larger picture is embedded smaller, as JPEG
DOTTED = 25  # up to this many points each gets a dot that tells its value


@dataclass(frozen=True)
class Series:
    """A line of a chart: (step, value), steps rising."""

    name: str
    points: list[Point]


@dataclass(frozen=True)
class Axis:
    """Values from `low` to `high`, drawn from pixel `start` to `stop`."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value = math.log10(max(value, low))
            low, high = math.log10(low), math.log10(high)
        return self.start + (value - low) / (high - low) * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Round values within the axis, about five."""
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            wide = self.high / self.low
            mantissas = (1, 2, 3, 5, 7) if wide < 10 else (1, 2, 5) if wide < 300 else (1,)
            every = max(1, (last - first) // 6)
            powers = range(first, last + 1, every)
            marks = [mantissa * 10.0**power for power in powers for mantissa in mantissas]
        else:
            rough = (self.high - self.low) / 5
            power = 10.0 ** math.floor(math.log10(rough))
            step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
            first = math.ceil(self.low / step - 1e-9)
            marks = [(first + i) * step for i in range(12)]
        slack = 1e-9 * (self.high - self.low)
        return [mark for mark in marks if self.low - slack <= mark <= self.high + slack]


def number(value: float) -> str:
    """Four digits, thousands apart."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def percent(fraction: float, digits: int = 2) -> str:
    return f"{100 * fraction:.{digits}f} %"


def span(seconds: float) -> str:
    """A duration as a person says it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def line_chart(
    title: str, series: list[Series], last: float, unit: str = "", log: bool = False
) -> str:
    """A figure of lines over the steps 0 to `last`; on a log axis zeros lie at its foot."""
    say = percents if unit == "%" else number
    values = [value for line in series for _, value in line.points]
    log = log and min(values) >= 0 and max(values) > 0
    x = Axis(0, max(last, 1), LEFT, WIDTH - RIGHT)
    y = Axis(*limits(values, log), HEIGHT - BOTTOM, TOP, log)
    marks, legend = [], []
    for i, line in enumerate(series):
        colour = i % COLOURS
        places = [(x.place(step), y.place(value)) for step, value in _thin(line.points)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
        marks.append(f'<polyline class="line c{colour}" points="{path}"/>')
        if len(line.points) <= DOTTED:
            for (a, b), (step, value) in zip(places, line.points, strict=True):
                said = f"{line.name}: {say(value)} at step {step:,.0f}"
                marks.append(
                    f'<circle class="dot c{colour}" cx="{a:.1f}" cy="{b:.1f}" r="2.5">'
                    f"<title>{escape(said)}</title></circle>"
                )
        final = say(line.points[-1][1])
        legend.append(
            f'<span class="key"><i class="c{colour}"></i>{escape(line.name)} <b>{final}</b></span>'
        )
    scale = ", log scale" if log else ""
    return _figure(title + scale, "".join(legend), frame(x, y, say, "step") + "".join(marks))


def reliability(rows: list[tuple[int, float, float]]) -> str:
    """Accuracy over confidence, from (images, mean confidence, accuracy) of equal bins."""
    x, y = Axis(0, 100, LEFT, WIDTH - RIGHT), Axis(0, 100, HEIGHT - BOTTOM, TOP)
    marks = [f'<path class="ideal" d="M{x.start},{y.start}L{x.stop},{y.stop}"/>']
    for i, (images, confidence, accuracy) in enumerate(rows):
        if images:
            said = f"{images} images: confidence {percent(confidence, 1)},"
            said += f" accuracy {percent(accuracy, 1)}"
            marks.append(_bar(x, y, i, len(rows), 100 * accuracy, said))
            a, b = x.place(100 * confidence), y.place(100 * accuracy)
            marks.append(f'<circle class="dot c1" cx="{a:.1f}" cy="{b:.1f}" r="3"/>')
    legend = (
        '<span class="key"><i class="c0"></i>accuracy of a bin</span>'
        '<span class="key"><i class="c1"></i>at its mean confidence</span>'
    )
    grid = frame(x, y, number, "confidence, %")
    return _figure("Reliability: accuracy, %", legend, grid + "".join(marks))


def histogram(counts: list[int]) -> str:
    """Share of the images by confidence, from counts of equal bins."""
    shares = [100 * count / max(sum(counts), 1) for count in counts]
    x = Axis(0, 100, LEFT, WIDTH - RIGHT)
    y = Axis(0, max(*shares, 1) * 1.05, HEIGHT - BOTTOM, TOP)
    bars = [
        _bar(x, y, i, len(counts), share, f"{counts[i]} images, {share:.1f} %")
        for i, share in enumerate(shares)
    ]
    grid = frame(x, y, number, "confidence, %")
    return _figure("How confident it is: share of the images, %", "", grid + "".join(bars))


def percents(value: float) -> str:
    return f"{value:.3g} %"


def _bar(x: Axis, y: Axis, i: int, bins: int, height: float, said: str) -> str:
    left, right, top = x.place(100 * i / bins), x.place(100 * (i + 1) / bins), y.place(height)
    return (
        f'<rect class="bar c0" x="{left + 1:.1f}" y="{top:.1f}" width="{right - left - 2:.1f}"'
        f' height="{y.start - top:.1f}"><title>{escape(said)}</title></rect>'
    )


def limits(values: Sequence[float], log: bool) -> tuple[float, float]:
    """A little beyond the least and the greatest value; never an empty range."""
    low, high = min(values), max(values)
    if log:
        return min(value for value in values if value > 0) / 1.1, high * 1.1
    low = min(low, 0.0)  # heights can be compared only from 0 on
    margin = 0.04 * (high - low) or 1.0
    return (low - margin if low < 0 else 0.0), high + margin


def _thin(points: list[Point]) -> list[Point]:
    """`points`, or the least and greatest of each stretch, so that spikes stay."""
    if len(points) <= MOST_POINTS:
        return points
    size = -(-len(points) // (MOST_POINTS // 2))
    kept: list[Point] = []
    for at in range(0, len(points), size):
        stretch = points[at : at + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def frame(
    x: Axis,
    y: Axis,
    say: Callable[[float], str],
    label: str,
    marked: Iterable[float] | None = None,
) -> str:
    """Grid, ticks and the name of the x axis, whose ticks are at `marked` or at round values."""
    parts = []
    for tick in y.ticks():
        at = y.place(tick)
        parts.append(f'<path class="grid" d="M{x.start},{at:.1f}H{x.stop}"/>')
        parts.append(
            f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{say(tick)}</text>'
        )
    for tick in x.ticks() if marked is None else marked:
        at, base = x.place(tick), HEIGHT - BOTTOM
        parts.append(f'<path class="tick" d="M{at:.1f},{base}v4"/>')
        parts.append(
            f'<text x="{at:.1f}" y="{base + 15}" text-anchor="middle">{number(tick)}</text>'
        )
    parts.append(f'<path class="axis" d="M{x.start},{y.start}H{x.stop}"/>')
    parts.append(f'<text x="{x.stop}" y="{HEIGHT - 3}" text-anchor="end">{label}</text>')
    return "".join(parts)


def _figure(title: str, legend: str, drawing: str) -> str:
    return (
        f"<figure><figcaption><strong>{escape(title)}</strong>{legend}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{drawing}</svg></figure>\n"
    )


def picture(image: Image.Image, caption: str) -> str:
    """A figure with the image in it."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    kind = "png"
    if buffer.tell() > LARGEST_PNG:
        kind, buffer = "jpeg", io.BytesIO()
        image.thumbnail((512, 512))
        image.convert("RGB").save(buffer, "JPEG", quality=80)
    data = base64.b64encode(buffer.getvalue()).decode()
    return (
        f'<figure><img src="data:image/{kind};base64,{data}" alt="{escape(caption)}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def page(title: str, body: str, made: str) -> str:
    """The whole file; `body` is HTML."""
    return PAGE.format(title=escape(title), style=STYLE, body=body, made=escape(made))


def section(title: str, content: str, aside: str = "") -> str:
    """A titled part of the page; `content` is HTML."""
    small = f" <small>{escape(aside)}</small>" if aside else ""
    return f"<section><h2>{title}{small}</h2>\n{content}\n</section>\n"


def note(text: str) -> str:
    """A line of plain text."""
    return f'<p class="note">{escape(text)}</p>'


def table(head: Iterable[str], rows: list[list[str]]) -> str:
    """A table with a heading where there is one; cells are HTML."""
    top = "".join(f'<th scope="col">{cell}</th>' for cell in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>\n" for row in rows)
    thead = f"<thead><tr>{top}</tr></thead>" if top else ""
    return f'<div class="scroll"><table>{thead}<tbody>{body}</tbody></table></div>'


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}</main>
<footer>made {made} by sgan_dist</footer>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --ink: #1d2127; --dim: #68707c; --line: #e3e6ea; --page: #fcfcfd;
  --card: #fff; --hit: 42 111 219; --miss: 214 75 42;
  --c0: #2a6fdb; --c1: #d9622b; --c2: #23915d; --c3: #9a4fb8; --c4: #a8790a; --c5: #c2385a; }
@media (prefers-color-scheme: dark) { :root { --ink: #dfe3e8; --dim: #8d96a3; --line: #2b3038;
  --page: #14171b; --card: #1a1e23; --hit: 82 142 240; --miss: 236 104 70;
  --c0: #6aa5ff; --c1: #ff9a62; --c2: #58c792; --c3: #c98be3; --c4: #dcb04a; --c5: #ff7f9d; } }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main, footer { max-width: 1000px; margin: 0 auto; padding: 0 24px; }
footer { color: var(--dim); padding-top: 20px; padding-bottom: 32px; font-size: 13px; }
h1 { font-size: 26px; margin: 36px 0 0; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 44px 0 12px; padding-top: 14px; border-top: 1px solid var(--line); }
small { color: var(--dim); font-weight: 400; font-size: 13px; }
.state { font-size: 13px; font-weight: 600; padding: 2px 10px; border-radius: 99px; color: var(--c);
  border: 1px solid var(--c); vertical-align: 4px; --c: var(--c4); }
.state.done { --c: var(--c2); }
.state.failed { --c: var(--c5); }
.path { color: var(--dim); font-size: 13px; margin: 2px 0 10px; overflow-wrap: anywhere; }
.note { margin: 6px 0 12px; }
dl { display: flex; flex-wrap: wrap; gap: 12px; margin: 18px 0 0; }
dl div { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 10px 16px;
  flex: 1 1 auto; }
dt { color: var(--dim); font-size: 13px; }
dd { margin: 0; font-size: 22px; font-weight: 600; font-variant-numeric: tabular-nums; }
figure { margin: 0; }
figcaption { font-size: 13px; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(400px, 100%), 1fr));
  gap: 16px; }
.charts figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
  padding: 12px 12px 6px; max-width: 620px; }
.charts strong { display: block; }
.charts figcaption { min-height: 40px; }
.key { color: var(--dim); margin-right: 14px; white-space: nowrap; }
.key b { color: var(--ink); font-weight: 500; font-variant-numeric: tabular-nums; }
.key i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 5px;
  background: var(--c); }
.c0 { --c: var(--c0); } .c1 { --c: var(--c1); } .c2 { --c: var(--c2); }
.c3 { --c: var(--c3); } .c4 { --c: var(--c4); } .c5 { --c: var(--c5); }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--dim); font-size: 11px; font-variant-numeric: tabular-nums; }
.grid { stroke: var(--line); }
.axis, .tick { stroke: var(--dim); }
.line { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; }
.dot { fill: var(--c); }
.bar { fill: var(--c); fill-opacity: .45; }
.ideal { stroke: var(--dim); stroke-dasharray: 4 4; }
img { display: block; width: 100%; image-rendering: pixelated; background: #000; border-radius: 4px; }
.grids { display: grid; gap: 16px;
  grid-template-columns: repeat(auto-fill, minmax(min(260px, 100%), 1fr)); }
.mistakes { display: grid; gap: 14px 12px;
  grid-template-columns: repeat(auto-fill, minmax(104px, 1fr)); }
.grids figcaption, .mistakes figcaption { color: var(--dim); margin-top: 4px; line-height: 1.35; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 500; color: var(--dim); }
th, td { padding: 4px 14px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
td:first-child { color: var(--dim); white-space: nowrap; }
.matrix { border-collapse: separate; border-spacing: 2px; }
.matrix th, .matrix td { border: 0; padding: 5px 10px; min-width: 26px; text-align: center;
  white-space: nowrap; border-radius: 4px; color: var(--ink); }
.matrix th { color: var(--dim); }
.matrix .none { color: var(--line); }
.matrix .hit { background: rgb(var(--hit) / calc(.5 * var(--a))); }
.matrix .miss { background: rgb(var(--miss) / calc(.08 + .6 * var(--a))); }
.matrix .total { color: var(--dim); }
summary { cursor: pointer; color: var(--dim); }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 14px;
  overflow-x: auto; font-size: 13px; }
"""
