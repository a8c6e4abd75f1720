"""report.html: a run on one self-contained page, while it runs or when it is done."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from sgan_dist import charts, checkpoint
from sgan_dist.charts import Series, note, percent, picture, section, span, table
from sgan_dist.config import Config, DataConfig, load
from sgan_dist.data.index import DatasetIndex, load_index
from sgan_dist.data.stream import open_storage, transport
from sgan_dist.errors import UserError
from sgan_dist.evaluate import BINS, Evaluation, Mistake, examine
from sgan_dist.export import load_classifier
from sgan_dist.models import build_discriminator
from sgan_dist.networks import outputs

GRIDS = 6
MATRIX_CLASSES = 25  # with more classes the most frequent confusions are listed instead
ROWS = 30

RATES = {"d/fakes_detected": "fakes detected", "d/train_error": "error on labeled batches"}
ERRORS = {"validation_error": "averaged D", "validation_error_raw": "without averaging"}
PLAYERS = {"d": "Discriminator's", "g": "Generator's"}
STARTS = {
    "time": "at", "world_size": "processes", "device": "on", "job": "SLURM job", "nodes": "nodes",
}  # fmt: skip
NORMS = {"d/gradient_norm": "discriminator", "g/gradient_norm": "generator"}


Pairs = list[tuple[str, str]]  # name and value, HTML


def make_report(run: Path, root: str | None = None) -> Path:
    """Writes RUN/report.html whole or not at all, and returns its path.

    A run that is done is shown with its test split; any other with the validation split, as the
    newest checkpoint classifies it. Where the run's dataset can't be read, that part is left out.

    Raises:
        UserError: `run` is not a run directory, or can't be written, or `root` is not its dataset.
    """
    config = load(run / "config.yaml")
    summary = json.loads((run / "summary.json").read_text()) if (run / "DONE").exists() else {}
    lines = _lines(run / "metrics.jsonl")
    step = max(line["step"] for line in [summary or {"step": 0}, *lines])
    try:
        data = dataclasses.replace(config.data, root=root or config.data.root)
        judged, figures = _judge(run, config, data, summary)
    except UserError as error:
        if root is not None:
            raise
        judged, figures = _not_judged(str(error)), []
    body = [
        _header(run, config, summary, step, figures),
        section("Alarms", _alarms(lines)),
        section("Starts", _starts(run)),
        section("Curves", _curves(run, lines, step)),
        section("Samples over time", _samples(run, config)),
        judged,
        section("Figures", _figures(summary)),
        section("Config", _config(run)),
    ]
    made = time.strftime("%Y-%m-%d %H:%M:%S %z")
    page = charts.page(config.name, "".join(body), made)
    path, partial = run / "report.html", run / f".report-{os.getpid()}.partial"
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error
    return path


def _judge(
    run: Path, config: Config, data: DataConfig, summary: dict[str, Any]
) -> tuple[str, Pairs]:
    """The sections on how good the classifier is, and the header's figures."""
    if summary:
        split, step, trained_on = "test", summary["step"], summary["data_fingerprint"]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        network, _ = load_classifier(run / "classifier.safetensors")
        index = load_index(data.root, transport(data))
    else:
        # on the CPU: a report must not take the device's memory from the run
        split, device = "validation", torch.device("cpu")
        path, damaged = checkpoint.latest(run)
        if path is None:
            return _not_judged("; ".join(["there is no checkpoint yet", *damaged])), []
        index = load_index(data.root, transport(data))
        network, meta = _averaged(path, config, index)
        step, trained_on = meta["step"], meta["meaning"]["data_fingerprint"]
    if index.fingerprint != trained_on:
        raise UserError(
            f"{data.root} is not the dataset that {run} was trained on: name that with --data"
        )
    with open_storage(data) as storage:
        found = examine(network.to(device), index, storage, split, config.loss.form)
    judged = found.evaluation()
    whose = f"the {split} split, {judged.images:,} images, after step {step:,}"
    names = index.class_names
    parts = [
        section("Confusion", _confusion(judged, names), whose),
        section("Most confident mistakes", _mistakes(found.mistakes, names), whose),
        section("Calibration", _calibration(judged), whose),
    ]
    figures = [("calibration error", percent(judged.calibration_error))]
    if not summary:
        figures.insert(0, (f"validation error, step {step:,}", percent(judged.error)))
    return "".join(parts), figures


def _not_judged(why: str) -> str:
    return section("Confusion, mistakes and calibration", note(f"Not evaluated: {why}."))


def _averaged(path: Path, config: Config, index: DatasetIndex) -> tuple[nn.Module, dict[str, Any]]:
    """The averaged D of a checkpoint, and the checkpoint's meta."""
    try:
        meta, state = checkpoint.read_meta(path), checkpoint.read_state(path)["average"]
    except FileNotFoundError as error:
        raise UserError(f"{path.name} was replaced while it was read: report once more") from error
    height, width, channels = index.image_shape
    network = build_discriminator(
        config.model.discriminator,
        (channels, height, width),
        outputs(config, len(index.class_names)),
        config.model.discriminator_args,
    )
    network.to(next(iter(state.values())).dtype).load_state_dict(state)
    return network, meta


def _lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, but for one that is being written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _series(lines: list[dict[str, Any]], names: dict[str, str], scale: float = 1) -> list[Series]:
    """Metric `key` as a line called `names[key]`, where there is any of it."""
    found = []
    for key, name in names.items():
        points = [(line["step"], scale * line[key]) for line in lines if key in line]
        points = [point for point in points if math.isfinite(point[1])]
        if points:
            found.append(Series(name, points))
    return found


def _header(run: Path, config: Config, summary: dict[str, Any], step: int, figures: Pairs) -> str:
    """Name, state and the headline figures."""
    state, reason = _state(run, done=bool(summary))
    names = {"test_error": "test error", "supervised_test_error": "test error, supervised only"}
    shown = [(name, percent(summary[key])) for key, name in names.items() if key in summary]
    shown += [*figures, ("steps", f"{step:,} <small>of {config.train.steps:,}</small>")]
    if summary:
        shown.append(("time", span(summary["wall_seconds"])))
    tiles = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in shown)
    return (
        f'<header><h1>{escape(config.name)} <span class="state {state}">{state}</span></h1>\n'
        f'<p class="path">{escape(str(run.absolute()))}</p>'
        f"{note(reason) if reason else ''}<dl>{tiles}</dl></header>\n"
    )


def _state(run: Path, done: bool) -> tuple[str, str]:
    """In a word, and what there is to say about it."""
    if done:
        return "done", ""
    logs = [run / "metrics.jsonl", run / "supervised" / "metrics.jsonl"]
    written = max((path.stat().st_mtime for path in logs if path.exists()), default=0.0)
    failed = run / "FAILED"
    # a run that writes on has not failed: FAILED is of a second start that was refused
    if failed.exists() and failed.stat().st_mtime >= written:
        return "failed", failed.read_text().strip()
    if not written:
        return "unfinished", "It has not logged anything yet."
    age = span(time.time() - written)
    return "unfinished", f"Running or stopped: its last figures were {age} old."


def _alarms(lines: list[dict[str, Any]]) -> str:
    """What the run itself found suspicious: metrics `alarm` or `alarm/...` hold a sentence."""
    found = [
        (line["step"], value)
        for line in lines
        for key, value in line.items()
        if key.split("/")[0] == "alarm"
    ]
    if not found:
        return note("No alarms.")
    rows = [[f"{step:,}", escape(str(said))] for step, said in found[-ROWS:]]
    more = note(f"The last {ROWS} of {len(found)}.") if len(found) > ROWS else ""
    return table(["step", "alarm"], rows) + more


def _starts(run: Path) -> str:
    """When and on what the run was started, and started again."""
    rows = [
        [f"{line['step']:,}", *(escape(str(line.get(key, ""))) for key in STARTS)]
        for line in _lines(run / "starts.jsonl")
    ]
    return table(["from step", *STARTS.values()], rows) if rows else note("Not told.")


def _curves(run: Path, lines: list[dict[str, Any]], step: int) -> str:
    """One chart for each kind of metric that there is."""
    losses_of = {f"{who} losses": dict[str, str]() for who in PLAYERS.values()}
    for key in dict.fromkeys(key for line in lines for key in line):
        *path, name = key.replace("_", " ").split("/")
        if path and path[0] in PLAYERS and key not in RATES and key not in NORMS:
            title = f"{PLAYERS[path[0]]} {'/'.join(path[1:]) or 'losses'}"
            losses_of.setdefault(title, {})[key] = name
    errors = _series(lines, ERRORS, 100)
    alone = _lines(run / "supervised" / "metrics.jsonl")
    errors += _series(alone, {"validation_error": "supervised only"}, 100)
    drawn = [
        *((title, _series(lines, names), "", True) for title, names in losses_of.items()),
        ("Validation error", errors, "%", True),
        ("Rates", _series(lines, RATES, 100), "%", False),
        ("Gradient norms", _series(lines, NORMS), "", True),
        ("Images a second", _series(lines, {"time/images_per_s": "images/s"}), "", False),
    ]
    last = max((point[0] for line in errors for point in line.points), default=0)
    figures = [
        charts.line_chart(title, series, max(step, last), unit, log)
        for title, series, unit, log in drawn
        if series
    ]
    absent = [title.lower() for title, series, _, _ in drawn if not series]
    left_out = note(f"Nothing logged for: {', '.join(absent)}.") if absent else ""
    return f'<div class="charts">{"".join(figures)}</div>{left_out}'


def _samples(run: Path, config: Config) -> str:
    """Up to GRIDS grids of generated images, evenly chosen, the first and the last among them."""
    if config.train.supervised_only:
        return note("A supervised-only run has no generator.")
    paths = sorted((run / "samples").glob("step-*.png"))
    if not paths:
        return note("No samples yet.")
    chosen = np.unique(np.linspace(0, len(paths) - 1, GRIDS).round().astype(int))
    figures = []
    for path in (paths[i] for i in chosen):
        caption = f"step {int(path.stem.removeprefix('step-')):,}"
        try:
            with Image.open(path) as image:
                figures.append(picture(image, caption))
        except OSError:  # being written
            figures.append(note(f"{path.name} can't be read."))
    return f'<div class="grids">{"".join(figures)}</div>'


def _confusion(found: Evaluation, names: Sequence[str]) -> str:
    """The matrix, shaded by count; of many classes the most frequent confusions alone."""
    missed = found.per_class_error()
    errors = sum(map(sum, found.confusion)) - sum(row[i] for i, row in enumerate(found.confusion))
    said = note(f"Error {percent(found.error)}: {errors:,} of {found.images:,}.")
    pairs = [
        (count, i, j)
        for i, row in enumerate(found.confusion)
        for j, count in enumerate(row)
        if i != j and count
    ]
    if len(names) > MATRIX_CLASSES:
        rows = [
            [escape(names[i]), escape(names[j]), f"{count:,}", percent(missed[i])]
            for count, i, j in sorted(pairs, key=lambda pair: -pair[0])[:ROWS]
        ]
        return said + table(["class", "taken for", "images", "error of the class"], rows)
    most = max((count for count, _, _ in pairs), default=1)
    lines = []
    for i, row in enumerate(found.confusion):
        cells = []
        for j, count in enumerate(row):
            share = count / max(sum(row), 1) if i == j else count / most
            kind = "hit" if i == j else "miss"
            shade = f' class="{kind}" style="--a:{share:.2f}"' if count else ' class="none"'
            cells.append(f"<td{shade}>{count or '·'}</td>")
        lines.append(
            f'<tr><th scope="row">{escape(names[i])}</th>{"".join(cells)}'
            f'<td class="total">{percent(missed[i], 1)}</td></tr>\n'
        )
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    return (
        f'{said}<div class="scroll"><table class="matrix"><thead><tr><th>class \\ taken for</th>'
        f'{head}<th scope="col">error</th></tr></thead><tbody>{"".join(lines)}</tbody></table></div>'
    )


def _mistakes(mistakes: list[Mistake], names: Sequence[str]) -> str:
    if not mistakes:
        return note("No mistakes.")
    figures = []
    for mistake in mistakes:
        pixels = mistake.image
        image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
        image.thumbnail((96, 96))
        who = f"{names[mistake.label]} taken for {names[mistake.guess]}"
        figures.append(picture(image, f"{who}, {percent(mistake.confidence, 1)}"))
    return f'<div class="mistakes">{"".join(figures)}</div>'


def _calibration(found: Evaluation) -> str:
    said = note(
        f"Expected calibration error {percent(found.calibration_error)} over {BINS} bins;"
        f" negative log-likelihood {found.nll:.4f} nats."
    )
    diagram = charts.reliability(found.bins)
    return f'{said}<div class="charts">{diagram}{charts.histogram([n for n, _, _ in found.bins])}</div>'


def _figures(summary: dict[str, Any]) -> str:
    if not summary:
        return note("The summary is written when the run is done.")
    rows = []
    for key, value in summary.items():
        parts = value if isinstance(value, dict) else {"": value}
        rows += [[escape(f"{key} {name}"), _value(key, part)] for name, part in parts.items()]
    return table([], rows)


def _config(run: Path) -> str:
    text = (run / "config.yaml").read_text()
    return f"<details><summary>config.yaml</summary><pre>{escape(text)}</pre></details>"


def _value(name: str, value: Any) -> str:
    """A figure as a person reads it."""
    if "error" in name:
        return percent(value)
    if name.endswith("_seconds"):
        return span(value)
    return f"{value:,}" if name == "images_seen" else escape(str(value))


def main(argv: Sequence[str]) -> int:
    """launch/report.py: writes RUN_DIR/report.html, of a running run too; 2 for a user's error."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--data", help="the prepared dataset; by default the run's own")
    args = parser.parse_args(argv)
    try:
        print(make_report(args.run_dir, args.data))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
