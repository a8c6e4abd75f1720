"""Draws docs/lanes.svg, by the arithmetic that training uses: `python benchmarks/lanes.py`."""

from __future__ import annotations

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from sgan_dist.data.order import WindowedOrder, lane_cut, lane_length
from sgan_dist.evaluation.plots import STYLE, svg
from sgan_dist.files import write_whole

SAMPLES = [30, 22, 34, 18, 27]  # of each shard
LANES, WINDOW, EPOCHS = 4, 12, 2
COLOURS = ["#8ecae6", "#ffb703", "#90be6d", "#f28482", "#b8a1e3"]
OUT = Path(__file__).parents[1] / "docs" / "lanes.svg"


def draw() -> Figure:
    """For each epoch a strip of shards, and below it the lanes, with dashed lines at windows."""
    order = WindowedOrder(SAMPLES, LANES, WINDOW, seed=0, split="unlabeled")
    n = order.samples
    figure = Figure(figsize=(8, 3.3), layout="constrained")
    figure.suptitle(
        f"{len(SAMPLES)} shards, {n} samples, {LANES} lanes, windows of up to {WINDOW}",
        x=0.01,
        ha="left",
    )
    for epoch, axes in enumerate(figure.subplots(EPOCHS)):
        axes.set(xlim=(0, n), ylim=(-0.7, 2.2))
        axes.axis("off")
        axes.set_title(f"epoch {epoch}: shards in keyed order, rotated", loc="left", fontsize=8)
        start = 0
        for piece in order.pieces(epoch, 0, n):
            axes.broken_barh(
                [(start, piece.samples)], (1.2, 1), color=COLOURS[piece.shard], ec="white"
            )
            label = f"{piece.shard}" if piece.samples < 12 else f"shard {piece.shard}"
            axes.text(start + piece.samples / 2, 1.7, label, ha="center", va="center")
            start += piece.samples
        for lane in range(LANES):
            cut, length = lane_cut(n, LANES, lane, epoch), lane_length(n, LANES, lane, epoch)
            axes.broken_barh(
                [(cut + 0.2, length - 0.4)], (0, 1), facecolor="none", edgecolor="#222"
            )
            axes.text(
                cut + length / 2, -0.35, f"lane {lane}: {length} samples", ha="center", va="center"
            )
            for window in range(1, -(-length // WINDOW)):
                start, _ = order.window_line(lane, epoch, window)
                axes.plot([start, start], [0, 1], ":", color="#222", lw=1)
    return figure


if __name__ == "__main__":
    with matplotlib.rc_context(STYLE):
        write_whole(OUT, svg(draw()))
