"""Many finished runs in one table, a CSV file and a plot: means and spreads over seeds and draws."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import io
import json
import os
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from sgan_dist import charts
from sgan_dist.charts import Axis, percents, span
from sgan_dist.config import FREE_AT_RESUME, Config, load
from sgan_dist.errors import UserError, plural

# Of what may change at a resume, what nevertheless tells two experiments apart; see `_settings`.
TELLING = {
    "data.source", "data.labels_per_class", "data.validation", "train.steps", "train.baseline_steps",
}  # fmt: skip
POOLED = FREE_AT_RESUME - TELLING | {"seed"}
UNKNOWN = "?"  # the labels of a run whose summary does not tell them
ALONE = "labeled images alone"
COLOURS = ("#2a6fdb", "#d9622b", "#23915d", "#9a4fb8", "#a8790a", "#c2385a")
STOP = charts.WIDTH - charts.RIGHT  # pixels, where the x axis ends
FEW = 8  # places on an axis that are marked one by one
STYLE = (
    "text{fill:#555}.title{fill:#222;font-weight:600}.grid{stroke:#ddd}.axis,.tick{stroke:#777}"
    ".line{fill:none;stroke-width:1.6}"
)


@dataclass(frozen=True)
class Run:
    """A finished run: where it is, its settings by dotted key, and its summary.json."""

    path: Path
    settings: dict[str, Any]
    summary: dict[str, Any]

    def of(self, keys: Iterable[str]) -> tuple[Any, ...]:
        """The values of settings; None for one that this run's networks don't have."""
        return tuple(self.settings.get(key) for key in keys)


@dataclass(frozen=True)
class Spread:
    """A mean of fractions with its sample standard deviation (n - 1), which one run has not."""

    mean: float
    std: float | None
    runs: int

    def __str__(self) -> str:
        around = "" if self.std is None else f" ± {100 * self.std:.2f}"
        return f"{100 * self.mean:.2f}{around} %"


@dataclass(frozen=True)
class Group:
    """The runs that are one row: alike in the settings that the table compares."""

    values: tuple[Any, ...]
    runs: list[Run]

    def spread(self, key: str) -> Spread | None:
        """Over the runs whose summary has `key`; None where none has."""
        found = [run.summary[key] for run in self.runs if key in run.summary]
        return spread_of(found) if found else None


def spread_of(found: Sequence[float]) -> Spread:
    """Of at least one fraction."""
    std = statistics.stdev(found) if len(found) > 1 else None
    return Spread(statistics.fmean(found), std, len(found))


def find(places: Sequence[Path]) -> list[Path]:
    """The run directories among `places` and, at any depth, in them; each once, none within another.

    A start that was refused before it had a config left FAILED alone, and is one too.

    Raises:
        UserError: there is none in one of the places.
    """
    found: dict[Path, Path] = {}
    for place in places:
        here = list(_runs_in(place))
        if not here:
            said = "holds no run" if place.is_dir() else "is not a folder"
            raise UserError(f"{place} {said}: name run directories, or folders that hold some")
        for path in here:
            found.setdefault(path.resolve(), path)
    return list(found.values())


def _runs_in(place: Path) -> Iterator[Path]:
    for folder, inner, files in os.walk(place):
        inner.sort()
        refused = "FAILED" in files and not any(Path(folder).rglob("config.yaml"))
        if "config.yaml" in files or refused:
            inner.clear()  # its baseline, and W&B's copies of configs, are not runs of their own
            yield Path(folder)


def read(paths: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """The finished runs, and a line for each other one that tells why it is left out.

    Of runs with the very same weights, such as a copied folder, the first one counts.
    """
    runs: dict[str, Run] = {}
    left_out = []
    for path in paths:
        try:
            run = _read(path)
        except UserError as error:
            left_out.append(f"{path}: {error}")
            continue
        first = runs.setdefault(run.summary["weights_sha256"], run)
        if first is not run:
            left_out.append(f"{path}: the same weights as {first.path}, which is counted")
    return list(runs.values()), left_out


def _read(path: Path) -> Run:
    if not (path / "DONE").exists():
        failed = path / "FAILED"
        why = f"failed: {failed.read_text().strip()}" if failed.exists() else "unfinished"
        raise UserError(why)
    config = load(path / "config.yaml")
    try:
        summary = json.loads((path / "summary.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"its summary.json can't be read ({error})") from error
    return Run(path, _settings(config, summary), summary)


def _settings(config: Config, summary: dict[str, Any]) -> dict[str, Any]:
    """By dotted key; `labels` counts the dataset's labeled images.

    Draws of one source have a root each. Where none is named, the root is the dataset.
    """
    settings = {"labels": summary.get("labels", UNKNOWN)}
    settings |= dict(_flat("", dataclasses.asdict(config)))
    settings["data.source"] = config.data.source or config.data.root
    return settings


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _flat(f"{prefix}.{key}" if prefix else key, item)
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def compared(runs: Sequence[Run], by: Sequence[str]) -> tuple[list[str], list[str]]:
    """The settings that tell rows apart, and those that differ within rows nevertheless.

    Without `by` the first are all that vary but seeds, draws, names, paths and intervals.

    Raises:
        UserError: `by` names no setting.
    """
    keys = list(dict.fromkeys(key for run in runs for key in run.settings))
    for key in by:
        if key not in keys:
            raise UserError(f"no run has a setting {key}: give one of config.yaml, such as seed")
    ignored = POOLED
    if all(run.settings["labels"] != UNKNOWN for run in runs):
        ignored = ignored | {"data.labels_per_class"}  # `labels` says it, of any dataset
    varying = [
        key
        for key in keys
        if key not in ignored and len({repr(run.settings.get(key)) for run in runs}) > 1
    ]
    if not by:
        return varying, []
    rows = group(runs, by)
    pooled = [
        key
        for key in varying
        if any(len({repr(r.of([key])) for r in row.runs}) > 1 for row in rows)
    ]
    return list(by), pooled


def group(runs: Sequence[Run], keys: Sequence[str]) -> list[Group]:
    """Runs with equal values of `keys` together, in the order of those values."""
    found: dict[str, Group] = {}
    for run in runs:
        values = run.of(keys)
        found.setdefault(repr(values), Group(values, [])).runs.append(run)
    return sorted(found.values(), key=lambda row: [_order(value) for value in row.values])


def _order(value: Any) -> tuple[bool, float, str]:
    """Numbers by size, then the others by their text."""
    numeric = isinstance(value, int | float)
    return not numeric, value if numeric else 0, str(value)


def table(keys: Sequence[str], groups: Sequence[Group]) -> str:
    """Markdown, a line a group."""
    rows = []
    for row in groups:
        steps = sorted({run.summary["step"] for run in row.runs})
        alone = row.spread("supervised_test_error")
        only = f" ({plural(alone.runs, 'run')})" if alone and alone.runs < len(row.runs) else ""
        wall = statistics.fmean(run.summary["wall_seconds"] for run in row.runs)
        rows.append(
            [
                *map(_shown, row.values),
                str(len(row.runs)),
                str(row.spread("test_error")),
                f"{alone}{only}" if alone else "",
                " to ".join(f"{step:,}" for step in dict.fromkeys([steps[0], steps[-1]])),
                span(wall),
            ]
        )
    head = [*keys, "runs", "test error", f"test error, {ALONE}", "steps", "mean time"]
    if not any(row[-3] for row in rows):
        for line in (head, *rows):
            del line[-3]
    return markdown(head, rows)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def listing(keys: Sequence[str], runs: Sequence[Run]) -> str:
    """CSV, a line a run."""
    own = ["test_error", "supervised_test_error", "step", "wall_seconds", "weights_sha256"]
    seeds = {"seed": "seed", "data.label_seed": "label_seed", "labels": "labels"}
    shown = [key for key in keys if key not in seeds]
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["run_dir", *shown, *seeds.values(), *own])
    for run in runs:
        figures = [run.summary.get(key) for key in own]
        lines.writerow([run.path, *run.of(shown), *run.of(seeds), *figures])
    return text.getvalue()


Point = tuple[float, Spread, str]  # place, height, whose


def plot(keys: Sequence[str], groups: Sequence[Group]) -> str:
    """A standalone SVG file of test errors: over the labels where they vary, else group by group."""
    counts = sorted({row.runs[0].settings["labels"] for row in groups} - {UNKNOWN})
    by_labels = "labels" in keys and len(counts) > 1
    others = [key for key in keys if not (by_labels and key == "labels")]
    series: dict[str, list[Point]] = {}
    for key in ("test_error", "supervised_test_error"):
        for i, row in enumerate(groups, start=1):
            run, spread, alone = row.runs[0], row.spread(key), key != "test_error"
            labels, name = run.settings["labels"], _named(others, run)
            if spread is None or (by_labels and labels == UNKNOWN):
                continue
            if by_labels:
                kind = ", ".join(filter(None, [ALONE if alone else "", name]))
                kind = kind or run.summary["trained_on"]
                point = (labels, spread, f"{kind}, {labels:,} labels")
            else:
                kind = ALONE if alone else f"{i}: {name or run.summary['trained_on']}"
                point = (i + 0.12 * alone, spread, kind)
            series.setdefault(kind, []).append(point)
    if by_labels:
        return lines(series)
    x = Axis(0.5, len(groups) + 0.5, charts.LEFT, STOP)
    return _drawn(series, x, "row of the table", range(1, len(groups) + 1), joined=False)


def lines(
    series: dict[str, list[Point]], label: str = "labeled images", of: str = "Test error"
) -> str:
    """A standalone SVG file of lines over a log axis, each line's points in their order."""
    places = sorted({place for points in series.values() for place, _, _ in points})
    x = Axis(places[0] / 1.15, places[-1] * 1.15, charts.LEFT, STOP, log=True)
    return _drawn(series, x, label, places if len(places) <= FEW else None, of)


def _named(keys: Sequence[str], run: Run) -> str:
    return ", ".join(
        f"{key} {_shown(value)}" for key, value in zip(keys, run.of(keys), strict=True)
    )


def _drawn(
    series: dict[str, list[Point]],
    x: Axis,
    label: str,
    marked: Iterable[float] | None,
    of: str = "Test error",
    joined: bool = True,
) -> str:
    """Each point with a whisker of one standard deviation either way, in percent, on a log axis."""
    spreads = [spread for points in series.values() for _, spread, _ in points]
    means = [100 * spread.mean for spread in spreads]
    ends = [100 * (s.mean + side * s.std) for s in spreads if s.std for side in (-1, 1)]
    log = max(means) > 0
    # a whisker that comes near 0 goes to the foot of the axis, and does not stretch it
    shown = [*means, *(end for end in ends if end >= min(means) / 3)]
    y = Axis(*charts.limits(shown, log), charts.HEIGHT - charts.BOTTOM, charts.TOP, log)
    parts, top = [charts.frame(x, y, percents, label, marked)], -18 * len(series) - 28
    for i, (name, points) in enumerate(series.items()):
        colour, foot = COLOURS[i % len(COLOURS)], top + 36 + 18 * i
        parts.append(f'<rect x="{charts.LEFT}" y="{foot - 9}" width="10" height="10"')
        parts.append(
            f' fill="{colour}"/><text x="{charts.LEFT + 16}" y="{foot}">{escape(name)}</text>'
        )
        places = [(x.place(place), y.place(100 * spread.mean)) for place, spread, _ in points]
        if joined:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
            parts.append(f'<polyline class="line" stroke="{colour}" points="{path}"/>')
        for (a, b), (_, spread, whose) in zip(places, points, strict=True):
            if spread.std:
                least, most = (y.place(100 * (spread.mean + s * spread.std)) for s in (-1, 1))
                shape = f"M{a - 4:.1f},{most:.1f}h8m-4,0V{least:.1f}m-4,0h8"
                parts.append(f'<path class="line" stroke="{colour}" d="{shape}"/>')
            said = f"{whose}: {spread}, {plural(spread.runs, 'run')}"
            parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}">')
            parts.append(f"<title>{escape(said)}</title></circle>")
    title = f"{of}, mean and standard deviation over runs" + (", log scale" if log else "")
    box = f'y="{top}" width="{charts.WIDTH}" height="{charts.HEIGHT - top}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 {top} {charts.WIDTH}'
        f' {charts.HEIGHT - top}" font-family="sans-serif" font-size="11">\n<style>{STYLE}</style>'
        f'<rect x="0" {box} fill="#fff"/>\n<text class="title" x="{charts.LEFT}" y="{top + 18}">'
        f"{title}</text>\n{''.join(parts)}\n</svg>\n"
    )


def collect(places: Sequence[Path], by: Sequence[str], out: Path | None) -> str:
    """Writes results.csv and results.svg to `out`, and returns what there is to print.

    `out` is by default the folder that holds all runs.

    Raises:
        UserError: no run is finished, `by` names no setting, or `out` can't be written.
    """
    paths = find(places)
    runs, left_out = read(paths)
    if not runs:
        raise UserError(f"no run is finished, wait or mend them: {'; '.join(left_out)}")
    keys, pooled = compared(runs, by)
    groups = group(runs, keys)
    said = [table(keys, groups), ""]
    if pooled:
        said += [f"Rows pool runs that differ in {', '.join(pooled)}.", ""]
    if left_out:
        said += [f"Left out, {len(left_out)} of {plural(len(paths), 'run')}:"]
        said += [*(f"- {line}" for line in left_out), ""]
    out = out or Path(os.path.commonpath([path.resolve().parent for path in paths]))
    files = {"results.csv": listing(keys, runs), "results.svg": plot(keys, groups)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write(out / name, text)
    except OSError as error:
        raise UserError(f"can't write to {out} ({error.strerror}): give another --out") from error
    return "\n".join([*said, *(str(out / name) for name in files)])


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(f".{path.name}-{os.getpid()}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def main(argv: Sequence[str]) -> int:
    """launch/collect.py: compares finished runs in a table, results.csv and results.svg.

    0, or 2 for a user's error.
    """
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="run directories, or folders of them")
    parser.add_argument(
        "--by", nargs="+", default=[], metavar="KEY", help="settings that make a row"
    )
    parser.add_argument("--out", type=Path, help="by default the folder that holds all runs")
    args = parser.parse_args(argv)
    try:
        print(collect(args.runs, args.by, args.out))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
