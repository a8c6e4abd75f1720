"""The results table, each row re-made from its config and seeds: what is missing is trained.

What is finished is a line of docs/results.csv. While the row's settings stay what they were it is
trained again on no machine.
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

from sgan_dist import collect, launcher, rundir
from sgan_dist.charts import span
from sgan_dist.config import Config, check, meaning, parse
from sgan_dist.errors import UserError, plural

LAUNCH = Path(__file__).parent.parent / "launch"
RESULTS = Path("docs/results.csv")
PAGE = Path("docs/results.md")
CURVE = Path("docs/label_efficiency.svg")
BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
# Part of what a figure means, and left free by `meaning`, which tells what may change at a resume.
ALSO = {*collect.TELLING, "data.label_seed"}
CODE = ("sgan_dist", "launch", "configs", "constraints.txt")


@dataclass(frozen=True)
class Row:
    """A row of a table, as launch/results.yaml lists it."""

    name: str
    table: str
    what: str
    draws: int
    curve: str | None  # the line of the plot over labels that it is a point of
    arguments: tuple[str, ...]
    config: Config  # that `arguments` make

    def settings(self, draw: int) -> str:
        """A short hash of all that a draw asks for beside the defaults.

        So a setting that is new, and off, changes none; what the defaults and the code were, a
        result's commit tells.
        """
        data = dataclasses.replace(self.config.data, label_seed=draw)
        asked = _meaning(dataclasses.replace(self.config, seed=draw, data=data))
        default = _meaning(Config())
        told = {key: value for key, value in asked.items() if value != default[key]}
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]

    def directory(self, draw: int) -> Path:
        """Other settings train elsewhere: a run directory goes on with its own alone."""
        return Path("runs/results") / self.name / f"draw-{draw}-{self.settings(draw)}"

    def command(self, draw: int) -> list[str]:
        """For `accelerate`. Rows with as many labels share the dataset of a draw."""
        data = self.config.data
        return [
            "launch",
            str(LAUNCH / "train.py"),
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
    """validation errors of the averaged D on the way: STEP:ERROR, a space between"""


def _meaning(config: Config) -> dict[str, Any]:
    return meaning(config) | {key: attrgetter(key)(config) for key in ALSO}


def read_rows(path: Path) -> dict[str, Row]:
    """Raises UserError where the file, or a config or an override in it, can't be read."""
    try:
        return {name: _row(name, **told) for name, told in yaml.safe_load(path.read_text()).items()}
    except (OSError, yaml.YAMLError, AttributeError, TypeError) as error:
        said = " ".join(str(error).split())
        raise UserError(f"can't read the rows in {path} ({said}): mend it") from error


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
        made = check(parse(arguments)[0])
    except UserError as error:
        raise UserError(f"row {name}: {error}") from error
    # said, so that a machine's own `accelerate config` makes no other figures
    precision = launcher.precision(made.train.precision, {})
    arguments.append(f"--train.precision={precision}")
    made = dataclasses.replace(made, train=dataclasses.replace(made.train, precision=precision))
    return Row(name, table, what, draws, curve, tuple(arguments), made)


def read_results() -> list[Result]:
    """What is finished; none where there is no docs/results.csv yet."""
    if not RESULTS.exists():
        return []
    kinds = get_type_hints(Result)
    with open(RESULTS, newline="", encoding="utf-8") as file:
        lines = csv.DictReader(file)
        try:
            found = [
                Result(**{name: kind(line[name]) for name, kind in kinds.items()}) for line in lines
            ]
        except (KeyError, ValueError, TypeError) as error:
            raise UserError(
                f"{RESULTS} can't be read up to line {lines.line_num}: mend it, or take it out"
            ) from error
    # of a draw that two machines have made, and git has merged, the last line counts
    return list({(result.row, result.draw): result for result in found}.values())


def keep(result: Result, rows: dict[str, Row]) -> None:
    """Adds a line to docs/results.csv, or replaces the one of the same row and draw."""
    kept = {(known.row, known.draw): known for known in [*read_results(), result]}
    order = {name: place for place, name in enumerate(rows)}
    text = io.StringIO()
    file = csv.writer(text, lineterminator="\n")
    file.writerow(field.name for field in dataclasses.fields(Result))
    for key in sorted(kept, key=lambda key: (order.get(key[0], len(order)), key)):
        file.writerow(dataclasses.astuple(kept[key]))
    _write(RESULTS, text.getvalue())


def _write(path: Path, text: str) -> None:
    try:
        collect.write(path, text)
    except OSError as error:
        raise UserError(
            f"can't write {path} ({error.strerror}): mend that and run the same again; runs that"
            " are done are not made again"
        ) from error


def publish(rows: dict[str, Row]) -> list[Result]:
    """Rewrites the tables in docs/results.md, and the plot; returns the results that hold."""
    try:
        before, begin, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    except OSError as error:
        raise UserError(
            f"can't read {PAGE} ({error.strerror}): run this from the project's folder"
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
    lines = _lines(rows.values(), results)
    if lines:
        _write(CURVE, collect.lines(lines))
        parts.append(f"![Test error by number of labels]({CURVE.name})")
    for title, series in _learning(rows.values(), results).items():
        path = CURVE.with_name(f"learning_{'_'.join(re.findall('[a-z0-9]+', title.lower()))}.svg")
        _write(path, collect.lines(series, "step", "Validation error"))
        parts.append(f"![Validation error by step: {title}]({path.name})")
    _write(PAGE, "\n\n".join([before + begin, *parts, end + after]))
    return results


def _tables(rows: Iterable[Row], results: Sequence[Result]) -> list[str]:
    """Each table's title and its Markdown."""
    head = ["what", "draws", "test error", "validation error", "steps", "mean time", "command"]
    tables: dict[str, list[list[str]]] = {}
    for row in rows:
        found = [result for result in results if result.row == row.name]
        cells = ["not run yet", "", f"{row.config.train.steps:,}", ""]
        if found:
            cells = [
                str(collect.spread_of([result.test_error for result in found])),
                str(collect.spread_of([result.validation_error for result in found])),
                f"{found[0].steps:,}",
                span(statistics.fmean(result.wall_seconds for result in found)),
            ]
        draws = f"{len(found)} of {row.draws}" if len(found) < row.draws else str(len(found))
        line = [row.what, draws, *cells, f"`python launch/results.py {row.name}`"]
        tables.setdefault(row.table, []).append(line)
    return [
        part
        for title, lines in tables.items()
        for part in (f"### {title}", collect.markdown(head, lines))
    ]


def _lines(rows: Iterable[Row], results: Sequence[Result]) -> dict[str, list[collect.Point]]:
    """The lines of the plot over labels, by name."""
    lines: dict[str, list[collect.Point]] = {}
    for row in rows:
        found = [result for result in results if result.row == row.name]
        if row.curve is not None and found:
            labels, spread = found[0].labels, collect.spread_of([r.test_error for r in found])
            point = (labels, spread, f"{row.curve}, {labels:,} labels")
            lines.setdefault(row.curve, []).append(point)
    return {name: sorted(points, key=lambda point: point[0]) for name, points in lines.items()}


def _learning(
    rows: Iterable[Row], results: Sequence[Result]
) -> dict[str, dict[str, list[collect.Point]]]:
    """For each table whose rows are no points of a curve, a line for each row, by name."""
    tables: dict[str, dict[str, list[collect.Point]]] = {}
    for row in rows:
        errors: dict[int, list[float]] = {}
        for result in results:
            if result.row == row.name and row.curve is None:
                for step, _, error in (told.partition(":") for told in result.learning.split()):
                    errors.setdefault(int(step), []).append(float(error))
        points: list[collect.Point] = [
            (step, collect.spread_of(found), f"{row.name}, step {step:,}")
            for step, found in sorted(errors.items())
        ]
        if points:
            tables.setdefault(row.table, {})[row.name] = points
    return tables


def train(row: Row, draw: int) -> Result | None:
    """Makes a run, or goes on with it, in processes of its own; None where it did not end well."""
    run, commit = row.directory(draw), _commit()
    command = [sys.executable, "-m", "accelerate.commands.accelerate_cli", *row.command(draw)]
    try:
        code = subprocess.run(command, check=False).returncode
    except KeyboardInterrupt:  # the launcher is gone by now, and the run saves what it has
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
        learning=_on_the_way(run / "metrics.jsonl"),
    )


def _on_the_way(metrics: Path) -> str:
    """`Result.learning` of a run's metrics."""
    lines = (json.loads(line) for line in metrics.read_text().splitlines())
    found = {line["step"]: line["validation_error"] for line in lines if "validation_error" in line}
    return " ".join(f"{step}:{error:.4f}" for step, error in found.items())


def _machine() -> str:
    """The CPU's model and number of cores."""
    told = Path("/proc/cpuinfo")
    lines = told.read_text().splitlines() if told.exists() else []
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


def make(listed: Path, names: Sequence[str], draws: int | None, dry_run: bool) -> list[str]:
    """Trains what is missing of the named rows, of all where none is named.

    Returns a line for each run that failed.

    Raises:
        UserError: a row is unknown, or a file can't be read or written.
    """
    rows = read_rows(listed)
    for name in names:
        if name not in rows:
            raise UserError(f"there is no row {name}: give some of {', '.join(rows)}")
    results = read_results() if dry_run else publish(rows)
    held = {(result.row, result.draw, result.settings) for result in results}
    missing = [
        (rows[name], draw)
        for name in dict.fromkeys(names or rows)
        for draw in range(rows[name].draws if draws is None else draws)
        if (name, draw, rows[name].settings(draw)) not in held
    ]
    print(f"{plural(len(missing), 'run')} to make", flush=True)
    failed = []
    for place, (row, draw) in enumerate(missing, start=1):
        said = f"{row.name}, draw {draw}"
        print(
            f"{place}/{len(missing)} {said}: accelerate {' '.join(row.command(draw))}", flush=True
        )
        if dry_run:
            continue
        result = train(row, draw)
        if result is None:
            failed.append(f"{said} is not done: see above why; the same command goes on with it")
            continue
        keep(result, rows)
        publish(rows)
    return failed


def main(argv: Sequence[str]) -> int:
    """Re-makes the rows of the results table: trains what docs/results.csv has not yet.

    0, 1 where a run failed, 2 for a user's error, 130 when stopped.
    """
    parser = argparse.ArgumentParser(prog="results.py", description=main.__doc__)
    parser.add_argument("row", nargs="*", help="by default all")
    parser.add_argument("--draws", type=int, help="of labels and seeds; by default the row's own")
    parser.add_argument("--rows", type=Path, default=LAUNCH / "results.yaml", metavar="FILE")
    parser.add_argument("--dry_run", action="store_true", help="list what would be trained")
    args = parser.parse_args(argv)
    try:
        failed = make(args.rows, args.row, args.draws, args.dry_run)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on", file=sys.stderr)
        return 130
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 1 if failed else 0
