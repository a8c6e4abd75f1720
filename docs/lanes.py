"""Draws docs/lanes.svg, by the arithmetic that training uses: `python docs/lanes.py`."""

from __future__ import annotations

from pathlib import Path

from sgan_dist.data.order import WindowedOrder, lane_cut, lane_length

SAMPLES = [30, 22, 34, 18, 27]  # of each shard
LANES, WINDOW, EPOCHS = 4, 12, 2
COLORS = ["#8ecae6", "#ffb703", "#90be6d", "#f28482", "#b8a1e3"]
SCALE, TOP, ROW, LEFT = 6.0, 34, 104, 20


def text(x: float, y: float, words: str, extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" {extra}>{words}</text>'


def draw() -> str:
    order = WindowedOrder(SAMPLES, LANES, WINDOW, seed=0, split="unlabeled")
    n = order.samples
    width, height = LEFT * 2 + n * SCALE, TOP + EPOCHS * ROW + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" '
        'font-family="sans-serif" font-size="12" fill="#222">',
        f'<rect width="{width:.0f}" height="{height}" fill="white"/>',
        text(
            LEFT,
            18,
            f"{len(SAMPLES)} shards, {n} samples, {LANES} lanes, windows of up to {WINDOW}",
        ),
    ]
    for epoch in range(EPOCHS):
        y, at = TOP + epoch * ROW, 0
        parts.append(text(LEFT, y + 10, f"epoch {epoch}: shards in keyed order, rotated"))
        for piece in order.pieces(epoch, 0, n):
            x, wide = LEFT + at * SCALE, piece.samples * SCALE
            color = COLORS[piece.shard]
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 16}" width="{wide:.1f}" height="24" '
                f'fill="{color}" stroke="white"/>'
            )
            label = f"{piece.shard}" if piece.samples < 12 else f"shard {piece.shard}"
            parts.append(text(x + wide / 2, y + 32, label, 'text-anchor="middle"'))
            at += piece.samples
        for lane in range(LANES):
            cut, length = lane_cut(n, LANES, lane, epoch), lane_length(n, LANES, lane, epoch)
            x, wide = LEFT + cut * SCALE, length * SCALE
            parts.append(
                f'<rect x="{x + 1:.1f}" y="{y + 46}" width="{wide - 2:.1f}" height="22" '
                'fill="none" stroke="#222"/>'
            )
            words = f"lane {lane}: {length} samples"
            parts.append(text(x + wide / 2, y + 84, words, 'text-anchor="middle"'))
            for window in range(1, -(-length // WINDOW)):
                start, _ = order.window_line(lane, epoch, window)
                at_x = LEFT + start * SCALE
                parts.append(
                    f'<line x1="{at_x:.1f}" y1="{y + 46}" x2="{at_x:.1f}" y2="{y + 68}" '
                    'stroke="#222" stroke-dasharray="3 3"/>'
                )
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("lanes.svg").write_text(draw(), encoding="utf-8")
