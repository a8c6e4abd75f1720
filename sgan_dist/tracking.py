"""Where a run's figures go: metrics.jsonl always, Weights & Biases beside it, and the terminal.

The only file of the package that imports wandb. Rank 0 alone tracks.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import wandb
from tqdm import tqdm

from sgan_dist.config import Config, load, meaning
from sgan_dist.errors import UserError
from sgan_dist.evaluate import Examination

# metric -> in a log file: name, format; on the narrow bar: the same in short, in this order
WATCHED = {
    "time/images_per_s": ("images/s", "{:6.0f}", "{:.0f}/s"),
    "time/data_wait": ("data wait", "{:4.0%}", "wait {:.0%}"),
    "d/supervised": ("supervised", "{:.3f}", "sup {:.2f}"),
    "d/unlabeled": ("unlabeled", "{:.3f}", "unl {:.2f}"),
    "d/fake": ("fake", "{:.3f}", "fake {:.2f}"),
    "d/consistency": ("consistency", "{:.3f}", "con {:.2f}"),
    "g/feature_matching": ("generator", "{:.3f}", "gen {:.2f}"),
    "g/non_saturating": ("generator", "{:.3f}", "gen {:.2f}"),
    "validation_error": ("validation error", "{:.2%}", "err {:.1%}"),
}
BAR = "{n_fmt}/{total_fmt} eta {remaining} {desc}"


def say(line: str) -> None:
    """A line on the terminal, above a progress bar where there is one."""
    tqdm.write(line, file=sys.stderr)
    sys.stderr.flush()


class Tracker:
    """One run's metrics, continued over restarts: lines after `start_step` are dropped first.

    On ranks other than 0 (`active` false) it does nothing.
    """

    def __init__(self, run: Path, config: Config, start_step: int, active: bool) -> None:
        self._file: TextIO | None = None
        self._wandb: Any = None
        self._wandb_failures = 0
        if active:
            _truncate(run / "metrics.jsonl", start_step)
            self._file = open(run / "metrics.jsonl", "a", buffering=1)
            self._wandb = _start_wandb(run, config) if config.tracking.wandb else None

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """One line; `time/` fields are the only ones that differ between equal runs."""
        if self._file is not None:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
        self._to_wandb(lambda run: run.log(metrics, step=step))

    def image(self, step: int, name: str, path: Path) -> None:
        """A picture for the dashboard."""
        self._to_wandb(lambda run: run.log({name: wandb.Image(str(path))}, step=step))

    def findings(self, found: Examination, class_names: tuple[str, ...]) -> None:
        """The confusion matrix and the most confident mistakes, for the dashboard."""
        names = list(class_names)
        counts = found.confusion.astype(int).tolist()
        cells = [[names[i], names[j], n] for i, row in enumerate(counts) for j, n in enumerate(row)]
        rows = [
            [wandb.Image(m.image.squeeze()), names[m.label], names[m.guess], m.confidence]
            for m in found.mistakes
        ]
        self._to_wandb(
            lambda run: run.log(
                {
                    "confusion": wandb.Table(["label", "guess", "images"], data=cells),
                    "mistakes": wandb.Table(["image", "label", "guess", "confidence"], data=rows),
                }
            )
        )

    def close(self, summary: dict[str, Any] | None = None) -> None:
        """Closes the files; a finished run brings its final figures."""
        if self._file is not None:
            self._file.close()
        if summary is not None:
            self._to_wandb(lambda run: run.summary.update(summary))
        self._to_wandb(lambda run: run.finish())
        self._wandb = None

    def _to_wandb(self, send: Callable[[Any], object]) -> None:
        """W&B must never stop training: its failures are counted and the first is shown."""
        if self._wandb is None:
            return
        try:
            send(self._wandb)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is shown
            self._wandb_failures += 1
            if self._wandb_failures == 1:
                say(f"W&B failed ({error}); training goes on, metrics.jsonl has everything")


def alert(run: Path, title: str, text: str) -> bool:
    """Sends a W&B alert (a mail or a message, as its user has set) about a run; whether it was sent.

    A run that is offline, or has not come as far as its W&B run, can't send one.
    """
    if not (run / "wandb_id").exists():
        return False
    tracked = _start_wandb(run, load(run / "config.yaml"))
    if tracked is None or tracked.offline or tracked.disabled:
        return False
    tracked.alert(title, text)
    tracked.finish(exit_code=1)
    return True


class Meters:
    """Means of the steps' metrics since the last line; name -> [total, count] in a checkpoint."""

    def __init__(self, state: dict[str, list[float]]) -> None:
        self.state = {name: list(pair) for name, pair in state.items()}

    def add(self, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            pair = self.state.setdefault(name, [0.0, 0.0])
            pair[0] += value
            pair[1] += 1

    def take(self) -> dict[str, float]:
        """The means; starts again from nothing."""
        means = {name: total / count for name, (total, count) in self.state.items()}
        self.state.clear()
        return means


class Progress:
    """A bar on a terminal, plain aligned lines in a log file."""

    def __init__(self, start: int, total: int, active: bool) -> None:
        self._active, self._total = active, total
        self._began, self._start = time.monotonic(), start
        self._latest: dict[str, Any] = {}
        self._bar = (
            tqdm(total=total, initial=start, dynamic_ncols=True, bar_format=BAR)
            if active and sys.stderr.isatty()
            else None
        )

    def step(self) -> None:
        if self._bar is not None:
            self._bar.update()

    def show(self, step: int, line: dict[str, Any]) -> None:
        """The figures of a metrics line that a person watches."""
        shown = {name: line[name] for name in WATCHED if name in line}
        if not self._active or not shown:
            return
        if self._bar is not None:
            self._latest |= shown
            short = [WATCHED[k][2].format(self._latest[k]) for k in WATCHED if k in self._latest]
            self._bar.set_description_str(" ".join(short).replace(" 0.", " ."))
            return
        cells = [f"{WATCHED[k][0]} {WATCHED[k][1].format(value)}" for k, value in shown.items()]
        left = (time.monotonic() - self._began) / (step - self._start) * (self._total - step)
        width = len(str(self._total))
        say(f"step {step:>{width}}/{self._total}  {'  '.join(cells)}  eta {left:.0f} s")

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _truncate(path: Path, step: int) -> None:
    """Drops lines after `step`, and a last line that a kill cut short."""
    if not path.exists():
        return
    kept = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged in line {number}: take the line out") from error
        kept.append(line)
    partial = path.with_name(".metrics.partial")
    partial.write_text("".join(kept))
    partial.replace(path)


def _start_wandb(run: Path, config: Config) -> Any:
    """A W&B run with the id kept in the run directory, or None where it can't be had."""
    kept = run / "wandb_id"
    if not kept.exists():
        kept.write_text(os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    mode = os.environ.get("WANDB_MODE")
    if mode is None:
        mode = "online" if wandb.api.api_key else "offline"
    # finish_timeout: what is not sent by then stays on disk, for `wandb sync`
    settings = wandb.Settings(silent=True, console="off", init_timeout=20, finish_timeout=30)
    for attempt in dict.fromkeys([mode, "offline"]):
        try:
            return wandb.init(
                project=os.environ.get("WANDB_PROJECT") or config.tracking.project,
                name=os.environ.get("WANDB_NAME") or config.name,
                id=kept.read_text().strip(),
                resume="allow",
                dir=os.environ.get("WANDB_DIR") or str(run),
                config=meaning(config),
                mode=attempt,  # type: ignore[arg-type]
                settings=settings,
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, it is shown
            say(f"W&B could not start {attempt} ({error}); training goes on without it")
            wandb.teardown()
    return None
