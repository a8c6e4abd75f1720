"""Where a run's metrics go: metrics.jsonl, Weights & Biases, and the terminal. Rank 0 alone tracks.

The only file of the package that imports wandb.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import wandb

from sgan_dist.config import Config, load, result_settings
from sgan_dist.errors import TransientError, UserError
from sgan_dist.evaluation.metrics import Counts
from sgan_dist.files import write_whole

log = logging.getLogger(__name__)

# what the terminal shows, in this order: metric -> name and format
WATCHED = {
    "time/images_per_s": "images/s {:6.0f}",
    "time/data_wait": "data wait {:4.0%}",
    "d/supervised": "supervised {:.3f}",
    "d/unlabeled": "unlabeled {:.3f}",
    "d/fake": "fake {:.3f}",
    "d/consistency": "consistency {:.3f}",
    "g/feature_matching": "generator {:.3f}",
    "g/non_saturating": "generator {:.3f}",
    "validation_error": "validation error {:.2%}",
}
WANDB_ID = "wandb_id"  # the file with the run's id


class Tracker:
    """One run's metrics, continued over restarts: lines after `start_step` are removed first.

    Does nothing if not `active`.
    """

    def __init__(self, run: Path, config: Config, start_step: int, active: bool) -> None:
        self._file: TextIO | None = None
        self._wandb: Any = None
        self._wandb_failed = False
        if active:
            _truncate(run / "metrics.jsonl", start_step)
            self._file = open(run / "metrics.jsonl", "a", buffering=1)
            self._wandb = _start_wandb(run, config) if config.tracking.wandb else None

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Writes one line. Only its `time/` fields differ between equal runs.

        Raises:
            TransientError: the disk is full.
        """
        if self._file is not None:
            try:
                self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            except OSError as error:
                raise TransientError(
                    f"cannot write {self._file.name}: {error.strerror}; free some space and run the"
                    " same command again"
                ) from error
        self._to_wandb(lambda run: run.log(metrics, step=step))

    def image(self, step: int, name: str, path: Path) -> None:
        """Sends an image file to the dashboard."""
        self._to_wandb(lambda run: run.log({name: wandb.Image(str(path))}, step=step))

    def predictions(self, counts: Counts, class_names: tuple[str, ...]) -> None:
        """Sends the confusion matrix and the most confident mistakes to the dashboard."""
        names = list(class_names)
        pairs = zip(*np.nonzero(counts.confusion), strict=True)  # of many classes most cells are 0
        cells = [[names[i], names[j], int(counts.confusion[i, j])] for i, j in pairs]
        rows = [
            [wandb.Image(m.image.squeeze()), names[m.label], names[m.guess], m.confidence]
            for m in counts.mistakes
        ]
        self._to_wandb(
            lambda run: run.log(
                {
                    "confusion": wandb.Table(["label", "guess", "images"], data=cells),
                    "mistakes": wandb.Table(["image", "label", "guess", "confidence"], data=rows),
                }
            )
        )

    def close(self, summary: dict[str, Any] | None = None, failed: bool = False) -> None:
        """Closes metrics.jsonl and the W&B run, which gets the summary. May be repeated."""
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:  # what `log` could not write: a resume writes it again
                log.warning(f"cannot write {self._file.name}: {error.strerror}")
        if summary is not None:
            self._to_wandb(lambda run: run.summary.update(summary))
        self._to_wandb(lambda run: run.finish(exit_code=int(failed)))
        self._wandb = None

    def _to_wandb(self, send: Callable[[Any], object]) -> None:
        """Calls `send` with the W&B run. W&B must never stop training: its first failure is logged."""
        if self._wandb is None:
            return
        try:
            send(self._wandb)
        except Exception as error:  # noqa: BLE001 - any failure of W&B
            if not self._wandb_failed:
                log.warning(
                    f"W&B failed ({error}); training continues, and metrics.jsonl is complete"
                )
            self._wandb_failed = True


def alert(run: Path, title: str, text: str) -> bool:
    """Sends a W&B alert (mail or Slack, as set in W&B) about a run; returns whether it was sent.

    It is not if W&B is offline or disabled, or if the run never started its W&B run.
    """
    if not (run / WANDB_ID).exists():
        return False
    wandb_run = _start_wandb(run, load(run / "config.yaml"))
    if wandb_run is None or wandb_run.offline or wandb_run.disabled:
        return False
    wandb_run.alert(title, text)
    wandb_run.finish(exit_code=1)
    return True


def log_progress(step: int, total: int, seconds: float, line: dict[str, Any]) -> None:
    """Logs the metrics of a line that are in WATCHED, `seconds` after step 0."""
    cells = [text.format(line[name]) for name, text in WATCHED.items() if name in line]
    if cells:
        eta = seconds / step * (total - step)
        log.info(f"step {step:>{len(str(total))}}/{total}  {'  '.join(cells)}  eta {eta:.0f} s")


def _truncate(path: Path, step: int) -> None:
    """Removes lines after `step`, and a last line that a kill cut short.

    Raises:
        UserError: a line before is damaged.
    """
    if not path.exists():
        return
    lines = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), start=1):
        try:
            if not line.endswith("\n") or json.loads(line)["step"] > step:
                break
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is damaged in line {number}: remove that line") from error
        lines.append(line)
    write_whole(path, "".join(lines))


def _start_wandb(run: Path, config: Config) -> Any:
    """Returns the W&B run of a run directory, online or else offline; None if neither starts.

    The user's own settings decide: WANDB_MODE, and the files that `wandb offline` writes.
    """
    id_file = run / WANDB_ID
    if not id_file.exists():
        write_whole(id_file, os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4))
    # finish_timeout: what is not sent by then stays on disk, for `wandb sync`
    settings = wandb.Settings(silent=True, console="off", init_timeout=20, finish_timeout=30)
    for offline in (False, True):
        try:
            if not offline and wandb.setup().settings.mode == "online":
                offline = not wandb.login(prompt=False)  # without a key
            return wandb.init(
                project=os.environ.get("WANDB_PROJECT") or config.tracking.project,
                name=os.environ.get("WANDB_NAME") or config.name,
                id=id_file.read_text().strip(),
                resume="allow",
                dir=os.environ.get("WANDB_DIR") or str(run),
                config=result_settings(config),
                mode="offline" if offline else None,
                settings=settings,
            )
        except Exception as error:  # noqa: BLE001 - any failure of W&B
            where, why = "offline" if offline else "online", " ".join(str(error).split())
            log.warning(f"W&B could not start {where} ({why}); training continues")
            wandb.teardown()
    return None
