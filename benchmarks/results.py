"""The results tables of docs/results.md, row by row: trains what is missing, and writes the page.

    python benchmarks/results.py [ROW...]

benchmarks/results.yaml lists the rows. A finished run is a line of docs/results.csv, which counts as
long as the row's settings stay the same, on any machine. Run it from the project's folder, with the
package installed.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import hashlib
import io
import json
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from sgan_dist.config import FREE_AT_RESUME, POOLED, Config, parse, result_settings
from sgan_dist.errors import UserError, plural
from sgan_dist.evaluation import compare
from sgan_dist.evaluation.plots import Point, duration
from sgan_dist.files import write_whole
from sgan_dist.parallel import launcher
from sgan_dist.run import rundir

ROWS = Path(__file__).with_name("results.yaml")
RESULTS = Path("docs/results.csv")
PAGE = Path("docs/results.md")
CURVE = Path("docs/label_efficiency.svg")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
# What a result depends on although it may change at a resume.
ALSO = FREE_AT_RESUME - POOLED | {"data.label_seed"}
CODE = ("sgan_dist", "launch", "configs", "constraints.txt")


@dataclass(frozen=True)
class Row:
    """A row of a table, as benchmarks/results.yaml lists it."""

    name: str
    table: str
    what: str
    draws: int
    curve: str | None
    """the line of the plot over labels that the row is a point of"""
    arguments: tuple[str, ...]
    config: Config
    """what `arguments` give"""

    def settings(self, draw: int) -> str:
        """A short hash of the settings that differ from the defaults.

        So a new setting that is off changes no hash. The defaults and the code are those of the
        result's commit.
        """
        data = dataclasses.replace(self.config.data, label_seed=draw)
        settings = _settings(dataclasses.replace(self.config, seed=draw, data=data))
        default = _settings(Config())
        changed = {key: value for key, value in settings.items() if value != default[key]}
        return hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()[:12]

    def directory(self, draw: int) -> Path:
        """The run directory: another one for other settings."""
        return Path("runs/results") / self.name / f"draw-{draw}-{self.settings(draw)}"

    def command(self, draw: int) -> list[str]:
        """The arguments of `accelerate`. Rows with as many labels share the dataset of a draw."""
        data = self.config.data
        return [
            *("launch", "-m", "sgan_dist", "train"),
            *self.arguments,
            f"--name={self.name}-draw-{draw}",
            f"--run_dir={self.directory(draw)}",
            f"--data.root={data.root}-labels-{data.labels_per_class}-draw-{draw}",
            f"--seed={draw}",
            f"--data.label_seed={draw}",
        ]


@dataclass(frozen=True)
class Result:
    """A finished run: a line of docs/results.csv."""

    row: str
    draw: int
    labels: int
    test_error: float
    validation_error: float
    steps: int
    wall_seconds: float
    world_size: int
    threads: int
    device: str
    machine: str
    date: str
    commit: str
    settings: str
    weights_sha256: str
    learning: str
    """validation errors of the averaged D during the run: STEP:ERROR, separated by spaces"""


def _settings(config: Config) -> dict[str, Any]:
    return result_settings(config) | {key: attrgetter(key)(config) for key in ALSO}


def read_rows(path: Path) -> dict[str, Row]:
    """Raises UserError where the file, or a config or an override in it, cannot be read."""
    try:
        rows = yaml.safe_load(path.read_text())
        return {name: _row(name, **fields) for name, fields in rows.items()}
    except (OSError, yaml.YAMLError, AttributeError, TypeError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"cannot read the rows in {path} ({message}): correct it") from error


def _row(
    name: str,
    table: str,
    what: str,
    config: str,
    overrides: Sequence[str] = (),
    draws: int = 3,
    curve: str | None = None,
) -> Row:
    arguments = [f"--config={config}", *overrides]
    try:
        parsed = parse(arguments)
    except UserError as error:
        raise UserError(f"row {name}: {error}") from error
    # explicit, so that a machine's own `accelerate config` does not change the results
    precision, _ = launcher.precision(parsed.machine.precision, {}, "CPU")
    arguments.append(f"--machine.precision={precision}")
    machine = dataclasses.replace(parsed.machine, precision=precision)
    parsed = dataclasses.replace(parsed, machine=machine)
    return Row(name, table, what, draws, curve, tuple(arguments), parsed)


def read_results() -> list[Result]:
    """What is finished; nothing where there is no docs/results.csv yet."""
    if not RESULTS.exists():
        return []
    types = get_type_hints(Result)
    with open(RESULTS, newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        try:
            results = [
                Result(**{name: read(line[name]) for name, read in types.items()}) for line in lines
            ]
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{RESULTS} cannot be read up to line {lines.line_num}: correct it, or remove it"
            ) from error
    # where git has merged two machines' results of a draw, the last line counts
    return list({(result.row, result.draw): result for result in results}.values())


def add_result(result: Result, rows: dict[str, Row]) -> None:
    """Adds a line to docs/results.csv, or replaces the one of the same row and draw."""
    results = {(known.row, known.draw): known for known in [*read_results(), result]}
    order = {name: place for place, name in enumerate(rows)}
    text = io.StringIO()
    file = csv.writer(text, lineterminator="\n")
    file.writerow(field.name for field in dataclasses.fields(Result))
    for key in sorted(results, key=lambda key: (order.get(key[0], len(order)), key)):
        file.writerow(dataclasses.astuple(results[key]))
    _write(RESULTS, text.getvalue())


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as error:
        raise UserError(
            f"cannot write {path} ({error.strerror}): correct that and run the same command again;"
            " finished runs are not repeated"
        ) from error


def publish(rows: dict[str, Row]) -> list[Result]:
    """Rewrites the tables in docs/results.md and the plots; returns the results that are valid."""
    try:
        before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    except OSError as error:
        raise UserError(
            f"cannot read {PAGE} ({error.strerror}): run this from the project's folder"
        ) from error
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{PAGE} has no {BEGIN} with {END} after it: put them where tables belong")
    results = [
        result
        for result in read_results()
        if result.row in rows and result.settings == rows[result.row].settings(result.draw)
    ]
    parts = _tables(rows.values(), results)
    lines = _label_curves(rows.values(), results)
    if lines:
        _write(CURVE, compare.plot_errors(lines))
        parts.append(f"![Test error by number of labels]({CURVE.name})")
    for title, lines in _learning_curves(rows.values(), results).items():
        path = CURVE.with_name(f"learning_{'_'.join(re.findall('[a-z0-9]+', title.lower()))}.svg")
        _write(path, compare.plot_errors(lines, "step", "Validation error"))
        parts.append(f"![Validation error by step: {title}]({path.name})")
    _write(PAGE, "\n\n".join([before + begin, *parts, end + after]))
    return results


def _tables(rows: Iterable[Row], results: Sequence[Result]) -> list[str]:
    """Each table's title and its Markdown."""
    head = ["what", "draws", "test error", "validation error", "steps", "mean time", "command"]
    tables: dict[str, list[list[str]]] = {}
    for row in rows:
        runs = [result for result in results if result.row == row.name]
        cells = ["not run yet", "", f"{row.config.train.steps:,}", ""]
        if runs:
            cells = [
                compare.mean_and_std([run.test_error for run in runs]),
                compare.mean_and_std([run.validation_error for run in runs]),
                f"{runs[0].steps:,}",
                duration(statistics.fmean(run.wall_seconds for run in runs)),
            ]
        draws = f"{len(runs)} of {row.draws}" if len(runs) < row.draws else str(len(runs))
        line = [row.what, draws, *cells, f"`python benchmarks/results.py {row.name}`"]
        tables.setdefault(row.table, []).append(line)
    return [
        part
        for title, lines in tables.items()
        for part in (f"### {title}", compare.markdown(head, lines))
    ]


def _label_curves(rows: Iterable[Row], results: Sequence[Result]) -> dict[str, list[Point]]:
    """The lines of the plot over labels, by name."""
    lines: dict[str, list[Point]] = {}
    for row in rows:
        runs = [result for result in results if result.row == row.name]
        if row.curve is not None and runs:
            labels, errors = runs[0].labels, [run.test_error for run in runs]
            point = compare.error_point(labels, errors, f"{row.curve}, {labels:,} labels")
            lines.setdefault(row.curve, []).append(point)
    return {name: sorted(points, key=attrgetter("x")) for name, points in lines.items()}


def _learning_curves(
    rows: Iterable[Row], results: Sequence[Result]
) -> dict[str, dict[str, list[Point]]]:
    """For each table of rows that are no points of a curve, a line for each row, by name."""
    tables: dict[str, dict[str, list[Point]]] = {}
    for row in rows:
        errors: dict[int, list[float]] = {}
        for result in results:
            if result.row == row.name and row.curve is None:
                for step, error in (pair.split(":") for pair in result.learning.split()):
                    errors.setdefault(int(step), []).append(float(error))
        points = [
            compare.error_point(step, values, f"{row.name}, step {step:,}")
            for step, values in sorted(errors.items())
        ]
        if points:
            tables.setdefault(row.table, {})[row.name] = points
    return tables


def train(row: Row, draw: int) -> Result | None:
    """Starts a run, or resumes it, in processes of its own; None where it did not finish."""
    run, commit = row.directory(draw), _commit()
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *row.command(draw)]
    try:
        code = subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:  # the launcher has ended, and the run is saving a checkpoint
        while rundir.in_use(run):
            time.sleep(0.2)
        raise
    if code or not (run / "DONE").exists():
        return None
    summary = json.loads((run / "summary.json").read_text())
    start = json.loads((run / "starts.jsonl").read_text().splitlines()[-1])
    return Result(
        row=row.name,
        draw=draw,
        labels=summary["labels"],
        test_error=summary["test_error"],
        validation_error=summary["validation_error"],
        steps=summary["step"],
        wall_seconds=round(summary["wall_seconds"], 1),
        world_size=start["world_size"],
        threads=start["threads"],
        device=start["device"],
        machine=_machine(),
        date=time.strftime("%Y-%m-%d"),
        commit=commit,
        settings=row.settings(draw),
        weights_sha256=summary["weights_sha256"][:12],
        learning=_learning(run / "metrics.jsonl"),
    )


def _learning(metrics: Path) -> str:
    """`Result.learning` of a run's metrics."""
    lines = (json.loads(line) for line in metrics.read_text().splitlines())
    errors = {line["step"]: line.get("validation_error") for line in lines}
    return " ".join(f"{step}:{e:.4f}" for step, e in errors.items() if e is not None)


def _machine() -> str:
    """The CPU's model and number of cores."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {plural(os.cpu_count() or 1, 'core')}"


def _commit() -> str:
    """The commit that is checked out, with a + where the code differs; empty without git."""
    head = subprocess.run(
        ["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode:
        return ""
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *CODE], check=False)
    return head.stdout.strip() + "+" * bool(changed.returncode)


def update(rows_file: Path, names: Sequence[str], draws: int | None, dry_run: bool) -> list[str]:
    """Trains what is missing of the named rows, or of all where none is named.

    Returns a line for each run that failed. Raises UserError for an unknown row or a bad file.
    """
    rows = read_rows(rows_file)
    for name in names:
        if name not in rows:
            raise UserError(f"there is no row {name}: give some of {', '.join(rows)}")
    results = read_results() if dry_run else publish(rows)
    finished = {(result.row, result.draw, result.settings) for result in results}
    missing = [
        (rows[name], draw)
        for name in dict.fromkeys(names or rows)
        for draw in range(rows[name].draws if draws is None else draws)
        if (name, draw, rows[name].settings(draw)) not in finished
    ]
    print(f"{plural(len(missing), 'run')} to train", flush=True)
    failed = []
    for number, (row, draw) in enumerate(missing, start=1):
        name, command = f"{row.name}, draw {draw}", " ".join(row.command(draw))
        print(f"{number}/{len(missing)} {name}: accelerate {command}", flush=True)
        if dry_run:
            continue
        result = train(row, draw)
        if result is None:
            failed.append(f"{name} is not finished, see above why; the same command resumes it")
            continue
        add_result(result, rows)
        publish(rows)
    return failed


def main(argv: Sequence[str]) -> int:
    """Trains what docs/results.csv does not have yet, and rewrites the tables and plots.

    Exit code 1 where a run failed, 2 for a user's error, 130 when interrupted.
    """
    parser = argparse.ArgumentParser(prog="results.py", description=main.__doc__)
    parser.add_argument("row", nargs="*", help="default: all")
    parser.add_argument("--draws", type=int, help="of labels and seeds; default: the row's own")
    parser.add_argument("--rows", type=Path, default=ROWS, metavar="FILE")
    parser.add_argument("--dry_run", action="store_true", help="list what would be trained")
    args = parser.parse_args(argv)
    try:
        failed = update(args.rows, args.row, args.draws, args.dry_run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command continues", file=sys.stderr)
        return 130
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the run saves, then stops
    sys.exit(main(sys.argv[1:]))
