"""report.html: a run on one self-contained page, while it runs or when it is done."""

from __future__ import annotations

import base64
import io
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from sgan_dist import checkpoint
from sgan_dist.config import Config, load
from sgan_dist.data.index import load_index
from sgan_dist.data.remote.urls import redact_url
from sgan_dist.data.stream import open_storage
from sgan_dist.errors import UserError
from sgan_dist.evaluation import plots
from sgan_dist.evaluation.classifier import Classifier, load_classifier
from sgan_dist.evaluation.metrics import Metrics, Mistake, count_predictions
from sgan_dist.evaluation.plots import Point, duration, percent
from sgan_dist.files import write_whole

GRIDS = 6
PIXELS = (512, 512)  # a larger grid is embedded at this size

NETWORKS = {"d": "Discriminator's", "g": "Generator's"}
ERRORS = {"validation_error": "averaged D", "validation_error_raw": "without averaging"}
RATES = {"d/fakes_detected": "fakes detected", "d/train_error": "error on labeled batches"}
STARTS = {
    "step": "from step", "time": "at", "world_size": "processes", "device": "on",
    "job": "SLURM job", "nodes": "nodes",
}  # fmt: skip
NORMS = {"d/gradient_norm": "discriminator", "g/gradient_norm": "generator"}


def make_report(run: str | os.PathLike[str], data: str | None = None) -> Path:
    """Writes RUN/report.html and returns its path.

    A run that is done is shown with its test split; any other with the validation split, as its
    newest checkpoint classifies it. Where the dataset cannot be read, that part is left out.
    `data` is another root of the run's dataset.

    Raises:
        UserError: `run` is not a run directory or cannot be written, or `data` is not its dataset.
    """
    run = Path(run)
    config = load(run / "config.yaml", data)
    summary = json.loads((run / "summary.json").read_text()) if (run / "DONE").exists() else {}
    log = _read_lines(run / "metrics.jsonl")
    step = max(line["step"] for line in [summary or {"step": 0}, *log])
    state, reason = ("done", "") if summary else _state(run)
    charts, not_logged = _charts(log, step)
    evaluation, problem = None, ""
    try:
        evaluation = _evaluate(run, config, summary)
    except UserError as error:
        if data is not None:
            raise
        problem = str(error)
    environment = Environment(
        loader=PackageLoader("sgan_dist.evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"percent": percent, "duration": duration, "thousands": "{:,}".format}
    config_text = (run / "config.yaml").read_text()
    page = environment.get_template("report.html.j2").render(
        config=config,
        config_text=config_text.replace(config.data.root, redact_url(config.data.root)),
        path=run.absolute(),
        summary=summary,
        step=step,
        state=state,
        reason=reason,
        alarms=_alarms(log),
        starts=_starts(run),
        charts=charts,
        not_logged=not_logged,
        samples=list(_samples(run)),
        time=time.strftime("%Y-%m-%d %H:%M:%S %z"),
        evaluation=evaluation,
        problem=problem,
    )
    try:
        write_whole(run / "report.html", page)
    except OSError as error:
        raise UserError(f"cannot write {run / 'report.html'}: {error.strerror}") from error
    return run / "report.html"


def _read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines, without a last line that is still being written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _state(run: Path) -> tuple[str, str]:
    """The state, in a word, of a run that is not done, and an explanation."""
    log, failed = run / "metrics.jsonl", run / "FAILED"
    written = log.stat().st_mtime if log.exists() else 0.0
    # where the log is newer, a second start was refused while the first one trains
    if failed.exists() and failed.stat().st_mtime >= written:
        return "failed", failed.read_text().strip()
    if not written:
        return "unfinished", "It has not logged anything yet."
    ago = duration(time.time() - written)
    return "unfinished", f"Running or stopped: it last logged {ago} ago."


def _alarms(log: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Step and sentence: all that was logged as `alarm` or `alarm/...`."""
    items = [(line["step"], key, value) for line in log for key, value in line.items()]
    return [(f"{step:,}", value) for step, key, value in items if key.split("/")[0] == "alarm"]


def _starts(run: Path) -> list[list[Any]]:
    """When and on what the run was started: a head and a line a start; nothing without a start."""
    lines = _read_lines(run / "starts.jsonl")
    keys = [key for key in STARTS if any(key in line for line in lines)]
    rows = [[line.get(key, "") for key in keys] for line in lines]
    return [[STARTS[key] for key in keys], *rows] if rows else []


def _charts(
    log: list[dict[str, Any]], step: int
) -> tuple[list[tuple[str, Markup, dict[str, str]]], list[str]]:
    """Title, plot and legend for each kind of metric, and the titles of those without values."""
    losses: dict[str, dict[str, str]] = {f"{name} losses": {} for name in NETWORKS.values()}
    for key in dict.fromkeys(key for line in log for key in line):
        network, *path = key.replace("_", " ").split("/")
        if network in NETWORKS and key not in RATES and key not in NORMS:
            title = f"{NETWORKS[network]} {'/'.join(path[:-1]) or 'losses'}"
            losses.setdefault(title, {})[key] = path[-1]
    kinds = [
        *((title, names, "", True) for title, names in losses.items()),
        ("Validation error", ERRORS, " %", True),
        ("Rates", RATES, " %", False),
        ("Gradient norms", NORMS, "", True),
        ("Images a second", {"time/images_per_s": "images/s"}, "", False),
    ]
    charts, not_logged = [], []
    for title, names, unit, log_axis in kinds:
        lines = {name: _points(log, key, name, unit) for key, name in names.items()}
        lines = {name: points for name, points in lines.items() if points}
        if not lines:
            not_logged.append(title.lower())
            continue
        figure = plots.plot_lines(lines, "step", unit=unit, log=log_axis)
        figure.axes[0].set_xlim(0, max(step, 1))
        title += ", log scale" if figure.axes[0].get_yscale() == "log" else ""
        last = {name: plots.number(points[-1].y) + unit for name, points in lines.items()}
        charts.append((title, plots.inline_svg(figure, title), last))
    return charts, not_logged


def _points(log: list[dict[str, Any]], key: str, name: str, unit: str) -> list[Point]:
    """The finite values of a metric over steps."""
    scale = 100 if unit == " %" else 1
    lines = [line for line in log if math.isfinite(line.get(key, math.nan))]
    values = [(line["step"], scale * line[key]) for line in lines]
    return [Point(x, y, text=f"{name}: {plots.number(y)}{unit} at step {x:,}") for x, y in values]


def _samples(run: Path) -> Iterator[tuple[str, str]]:
    """Up to GRIDS grids of generated images, evenly spaced, the first and the last included."""
    paths = sorted((run / "samples").glob("step-*.png"))
    for place in np.linspace(0, len(paths) - 1, min(GRIDS, len(paths))).round():
        path = paths[int(place)]
        try:
            with Image.open(path) as image:
                yield _data_uri(image, PIXELS), f"step {int(path.stem.removeprefix('step-')):,}"
        except OSError:
            yield "", f"{path.name} cannot be read."


def _data_uri(image: Image.Image, largest: tuple[int, int]) -> str:
    content = io.BytesIO()
    image.thumbnail(largest)
    image.save(content, "WEBP", lossless=True)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def _evaluate(run: Path, config: Config, summary: dict[str, Any]) -> dict[str, Any]:
    """How the classifier does on the test split, or for an unfinished run on the validation split.

    Raises UserError where there is no classifier yet, or the dataset is missing or another one.
    """
    index = load_index(config.data.root, config.remote)
    if summary:
        split, step, trained_on = "test", summary["step"], summary["data_fingerprint"]
        classifier = load_classifier(run / "classifier.safetensors")
        classifier.network.to("cuda" if torch.cuda.is_available() else "cpu")
    else:
        path, damaged = checkpoint.latest(run)
        if path is None:
            raise UserError("; ".join(["there is no checkpoint yet", *damaged]))
        try:
            meta, state = checkpoint.read_meta(path), checkpoint.read_state(path)
        except FileNotFoundError as error:
            raise UserError(f"{path.name} was replaced while it was read: try again") from error
        split, step, trained_on = "validation", meta["step"], meta["meaning"]["data_fingerprint"]
        # on the CPU: a report must not take GPU memory from the run
        classifier = Classifier.from_state(state["average"], config, index)
    if index.fingerprint != trained_on:
        raise UserError(
            f"{redact_url(config.data.root)} is not the dataset that {run} was trained on: give"
            " that with --data"
        )
    with open_storage(config) as storage:
        (counts,) = count_predictions([classifier], index, storage, split)
    metrics = counts.metrics(index.class_names)
    confusions = [
        (metrics.confusion[i][j], i, j)
        for i, j in itertools.permutations(range(len(index.class_names)), 2)
        if metrics.confusion[i][j]
    ]
    shares = [100 * images / metrics.images for images, _, _ in metrics.bins]
    return {
        "split": split,
        "step": step,
        "metrics": metrics,
        "confusions": sorted(confusions, key=lambda confusion: -confusion[0]),
        "mistakes": [_mistake(mistake, index.class_names) for mistake in counts.mistakes],
        "reliability": _reliability(metrics),
        "confidence": plots.inline_svg(plots.plot_bars(shares, "confidence, %"), "Confidence"),
    }


def _mistake(mistake: Mistake, names: Sequence[str]) -> tuple[str, str]:
    gray = mistake.image.shape[2] == 1
    image = Image.fromarray(mistake.image.squeeze(2) if gray else mistake.image)
    confusion = f"{names[mistake.label]} taken for {names[mistake.guess]}"
    return _data_uri(image, (96, 96)), f"{confusion}, {percent(mistake.confidence, 1)}"


def _reliability(metrics: Metrics) -> Markup:
    """Accuracy over confidence; a calibrated classifier's bars end at the diagonal."""
    images, confidence, accuracy = np.array(metrics.bins).T
    figure = plots.plot_bars(100 * accuracy, "confidence, %")
    figure.axes[0].plot([0, 100], [0, 100], "--", color=plots.TEXT, lw=1)
    x, y = 100 * confidence[images > 0], 100 * accuracy[images > 0]
    figure.axes[0].plot(x, y, "o", color=plots.COLOURS[1], ms=3)
    return plots.inline_svg(figure, "Reliability")
