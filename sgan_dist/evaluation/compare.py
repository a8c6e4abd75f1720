"""Finished runs in a table, a CSV file and a plot: mean and spread over seeds and draws of labels."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd

from sgan_dist.config import POOLED, SETTINGS, Config, load
from sgan_dist.config.identity import dotted, flatten
from sgan_dist.data.remote.urls import redact_url
from sgan_dist.errors import UserError, plural
from sgan_dist.evaluation.plots import Point, duration, plot_lines, svg
from sgan_dist.files import write_whole

FIGURES = ["test_error", "step", "wall_seconds", "weights_sha256"]  # of summary.json
UNKNOWN = "?"  # number of labels of a run whose summary does not have it
UNUSED = "-"  # value of a setting that has no effect in a run


def compare(places: Sequence[Path], by: Sequence[str], out: Path | None) -> str:
    """Writes results.csv and results.svg to `out`, and returns a table with notes.

    `places` are run directories, or folders that hold some at any depth. A row of the table is a
    group of runs with equal values of the settings `by`; without `by` of all settings that vary,
    except seeds, draws of labels, names, paths and intervals. `out` is by default the folder that
    holds all runs.

    Raises:
        UserError: no run is finished, `by` names no setting, or `out` cannot be written.
    """
    paths = find(places)
    runs, left_out = read(paths)
    if runs.empty:
        raise UserError(f"no run is finished: {'; '.join(left_out)}")
    keys, pooled, groups = group(runs, by)
    text = [table(keys, groups), ""]
    if pooled:
        text += [f"Rows pool runs that differ in {', '.join(pooled)}.", ""]
    if left_out:
        text += [f"Left out, {len(left_out)} of {plural(len(paths), 'run')}:"]
        text += [*(f"- {line}" for line in left_out), ""]
    out = out or Path(os.path.commonpath([path.resolve().parent for path in paths]))
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_whole(out / "results.csv", csv(keys, runs))
        write_whole(out / "results.svg", plot(keys, groups))
    except OSError as error:
        raise UserError(f"cannot write to {out} ({error.strerror}): give another --out") from error
    return "\n".join([*text, str(out / "results.csv"), str(out / "results.svg")])


def find(places: Iterable[Path]) -> list[Path]:
    """The run directories in `places`, each once, and none inside another.

    A start that was refused before it had a config left only FAILED, and counts as a run.

    Raises:
        UserError: there is none in one of the places.
    """
    runs: dict[Path, Path] = {}
    for place in places:
        paths = []
        for folder, inner, files in os.walk(place):
            inner.sort()
            refused = "FAILED" in files and not any(Path(folder).rglob("config.yaml"))
            if "config.yaml" in files or refused:
                inner.clear()  # W&B's copies of configs are not runs
                paths.append(Path(folder))
        if not paths:
            problem = "holds no run" if place.is_dir() else "is not a folder"
            raise UserError(f"{place} {problem}: name run directories, or folders that hold some")
        for path in paths:
            runs.setdefault(path.resolve(), path)
    return list(runs.values())


def read(paths: Iterable[Path]) -> tuple[pd.DataFrame, list[str]]:
    """The finished runs, by path: a column for each setting and each of FIGURES.

    And a line for each other run that says why it is left out. Of runs with the same weights, such
    as a copied folder, the first one counts.
    """
    runs: dict[Path, tuple[dict[str, Any], Config]] = {}
    first: dict[str, Path] = {}
    left_out = []
    for path in paths:
        try:
            values, config = _read(path)
            original = first.setdefault(values["weights_sha256"], path)
            if original != path:
                raise UserError(f"the same weights as {original}, which is counted")
            runs[path] = values, config
        except UserError as error:
            left_out.append(f"{path}: {error}")
    keys = dict.fromkeys(key for values, _ in runs.values() for key in values)
    rows = [
        [UNUSED if key.startswith(_unused(config)) else values.get(key) for key in keys]
        for values, config in runs.values()
    ]
    return pd.DataFrame(rows, index=runs.keys(), columns=keys, dtype=object), left_out


def _read(path: Path) -> tuple[dict[str, Any], Config]:
    if not (path / "DONE").exists():
        if (path / "FAILED").exists():
            raise UserError(f"failed: {(path / 'FAILED').read_text().strip()}")
        raise UserError("unfinished")
    config = load(path / "config.yaml")
    try:
        summary = json.loads((path / "summary.json").read_text())
        figures = {key: summary[key] for key in FIGURES}
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"its summary.json cannot be read ({error})") from error
    settings = dotted(flatten(config))  # with an entry for each argument of a network
    values = {
        "labels": summary.get("labels", UNKNOWN),
        "trained_on": summary.get("trained_on", UNKNOWN),
        **{k: str(v) if isinstance(v, list | dict) else v for k, v in settings.items()},
        # draws of labels from one source have a root each; without a source the root is the dataset
        "data.source": config.data.source or redact_url(config.data.root),
        **figures,
    }
    return values, config


def _unused(config: Config) -> tuple[str, ...]:
    """What the settings begin with that have no effect in a run."""
    if config.train.supervised_only:
        return tuple(key for key, rules in SETTINGS.items() if not rules.supervised)
    unused: tuple[str, ...] = ()
    if not config.uses_generator:
        unused += ("model.generator", "optim.generator", "batch.fake")
        unused += ("loss.unlabeled", "loss.fake", "loss.generator")
    if not config.uses_consistency:
        unused += ("loss.temperature", "loss.threshold", "teacher_augment")
    return unused


def group(runs: pd.DataFrame, by: Sequence[str]) -> tuple[list[str], list[str], list[pd.DataFrame]]:
    """The settings that are columns, those that differ within rows anyway, and the runs of each row.

    Raises:
        UserError: `by` names no setting.
    """
    settings = [key for key in runs if key not in FIGURES]
    for key in by:
        if key not in settings:
            raise UserError(f"no run has a setting {key}: give one of config.yaml, such as seed")
    pooled = POOLED | {"train.supervised_only"}  # `trained_on` has it
    if UNKNOWN not in set(runs["labels"]):
        pooled |= {"data.labels_per_class"}  # `labels` has it, for any dataset
    varying = [key for key in settings if key not in pooled and _varies(runs[key])]
    keys = list(by or varying)
    columns = [runs[key].map(_order) for key in keys] or [[0] * len(runs)]
    groups = [rows for _, rows in runs.groupby(columns)]
    return keys, [key for key in varying if any(_varies(rows[key]) for rows in groups)], groups


def _varies(values: Iterable[Any]) -> bool:
    return len(set(values) - {UNUSED}) > 1


def _order(value: Any) -> tuple[bool, Any]:
    """Orders numbers by size, then the others by their text."""
    numeric = isinstance(value, int | float)
    return not numeric, value if numeric else str(value)


def table(keys: Sequence[str], groups: Sequence[pd.DataFrame]) -> str:
    """Markdown in aligned columns, a line a group."""
    steps = [] if "train.steps" in keys else ["steps"]
    lines = []
    for runs in groups:
        extremes = dict.fromkeys([runs["step"].min(), runs["step"].max()])
        line = [_text(runs[key].iloc[0]) for key in keys]
        line += [str(len(runs)), mean_and_std(runs["test_error"])]
        line += [" to ".join(map(_text, extremes))] if steps else []
        lines.append([*line, duration(runs["wall_seconds"].mean())])
    return markdown([*keys, "runs", "test error", *steps, "mean time"], lines, align=True)


def markdown(head: Sequence[str], lines: Iterable[Sequence[str]], align: bool = False) -> str:
    """A table; `align` makes it readable in a terminal."""
    rows = [head, ["---"] * len(head), *lines]
    rows = [[cell.replace("|", "/") for cell in row] for row in rows]
    widths = [max(map(len, column)) if align else 0 for column in zip(*rows, strict=True)]
    cells = [[cell.ljust(n) for cell, n in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _text(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def mean_and_std(errors: Collection[float]) -> str:
    """`0.83 ± 0.07 %` of fractions, with the sample standard deviation (n - 1) where n is above 1."""
    std = f" ± {100 * statistics.stdev(errors):.2f}" if len(errors) > 1 else ""
    return f"{100 * statistics.fmean(errors):.2f}{std} %"


def csv(keys: Sequence[str], runs: pd.DataFrame) -> str:
    """A line a run."""
    seeds = ["seed", "data.label_seed", "labels"]
    columns = [*(key for key in keys if key not in seeds), *seeds, *FIGURES]
    frame = runs[columns].rename(columns={"data.label_seed": "label_seed"})
    return str(frame.to_csv(index_label="run_dir", lineterminator="\n"))


def plot(keys: Sequence[str], groups: Sequence[pd.DataFrame]) -> str:
    """An SVG file of test errors: over the labels where they vary, else row by row of the table."""
    counts = {rows["labels"].iloc[0] for rows in groups} - {UNKNOWN}
    by_labels = "labels" in keys and len(counts) > 1
    lines: dict[str, list[Point]] = {}
    for number, rows in enumerate(groups, start=1):
        run, errors = rows.iloc[0], rows["test_error"]
        hidden = {"trained_on", "labels"} if by_labels else {"trained_on"}
        parts = [f"{key} {_text(run[key])}" for key in keys if key not in hidden]
        if "trained_on" in keys or not parts:
            parts.insert(0, run["trained_on"])
        name = ", ".join(parts)
        if not by_labels:
            name = f"{number}: {name}"
            lines[name] = [error_point(number, errors, name)]
        elif run["labels"] != UNKNOWN:
            label = f"{name}, {run['labels']:,} labels"
            lines.setdefault(name, []).append(error_point(run["labels"], errors, label))
    return plot_errors(lines) if by_labels else plot_errors(lines, "row of the table", log_x=False)


def error_point(x: float, errors: Collection[float], label: str) -> Point:
    """The mean of fractions, in percent, with its spread and a tooltip."""
    std = statistics.stdev(errors) if len(errors) > 1 else 0.0
    text = f"{label}: {mean_and_std(errors)}, {plural(len(errors), 'run')}"
    return Point(x, 100 * statistics.fmean(errors), 100 * std, text)


def plot_errors(
    lines: Mapping[str, Sequence[Point]],
    x_label: str = "labeled images",
    of: str = "Test error",
    log_x: bool = True,
) -> str:
    """An SVG file of errors in percent, over a log axis as lines."""
    places = sorted({point.x for points in lines.values() for point in points})
    spaced = not log_x or all(b > 1.4 * a for a, b in pairwise(places))
    title = f"{of}, mean and standard deviation over runs"
    ticks = places if spaced else None
    figure = plot_lines(
        lines, x_label, unit=" %", log=True, log_x=log_x, x_ticks=ticks, title=title
    )
    return svg(figure)
